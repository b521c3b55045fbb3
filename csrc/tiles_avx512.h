// Products of tiles with AVX-512 and VNNI. Included after matmul-inl.h. A register holds 16 rows x 4
// columns.

constexpr int64_t kAhead = 4096;  // bytes from what is used to what is fetched into the second-level cache

inline void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

inline void quantize_group(const float* x, int8_t* q, float* scale, int32_t* sum) {
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  const __m512i magnitude =
      _mm512_set1_epi32(0x7fffffff);  // as integers magnitudes are in order, NaN the greatest
  const int32_t bits =
      _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                                               _mm512_and_si512(_mm512_castps_si512(b), magnitude)));
  float top;
  std::memcpy(&top, &bits, sizeof(top));
  if (bits >= 0x7f800000) {
    *scale = __builtin_nanf("");
    *sum = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_setzero_si256());
    return;
  }
  const __m512 inverse = _mm512_set1_ps(top >= kLeast ? 127.0F / top : 0.0F);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i p = _mm512_cvt_roundps_epi32(_mm512_mul_ps(a, inverse), kNearest);
  const __m512i r = _mm512_cvt_roundps_epi32(_mm512_mul_ps(b, inverse), kNearest);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(p));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtepi32_epi8(r));
  *scale = top / 127.0F;
  *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(p, r));
}

// The eight registers of a group's unsigned codes.
template <Format F>
inline void unpack(const uint8_t* group, __m512i* w) {
  if constexpr (F == Format::q8) {
    for (int v = 0; v < 8; ++v) w[v] = _mm512_load_si512(group + 64 * v);
  } else {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int v = 0; v < 4; ++v) {
      const __m512i both = _mm512_load_si512(group + 64 * v);
      w[v] = _mm512_and_si512(both, nibble);
      w[v + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    }
  }
}

template <Format F>
constexpr int32_t kZero = F == Format::q4 ? 8 : 128;  // the code of a zero

inline __mmask16 columns(int64_t width) {
  return static_cast<__mmask16>(width < 16 ? (1U << width) - 1 : 0xffffU);
}

inline __m512 scales_of(const uint8_t* scales, int64_t g) {
  return _mm512_maskz_cvtph_ps(
      0xffff, _mm256_load_si256(reinterpret_cast<const __m256i*>(scales + g * 2 * kTileRows)));
}

inline __m512i four(const int8_t* q) {  // the same four activations for every row of the tile
  int32_t bits;
  std::memcpy(&bits, q, sizeof(bits));
  return _mm512_set1_epi32(bits);
}

// R rows of x from `first` on with q4 or q8 weights.
template <Format F, int R>
inline void integer_rows(const uint8_t* tile, const Rows& x, int64_t first, float* out, int64_t out_stride,
                         __mmask16 mask) {
  const int64_t n = groups(x.cols);
  const uint8_t* scales = tile + n * code_bytes(F);
  const int8_t* q = x.q + first * n * kGroup;
  const float* scale = x.scale + first * n;
  const int32_t* sum = x.sum + first * n;
  __m512 total[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) total[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < n; ++g) {
    const uint8_t* group = tile + g * code_bytes(F);
    prefetch(group + kAhead, code_bytes(F));
    prefetch(scales + tile_bytes(F, x.cols) + g * 2 * kTileRows, 2 * kTileRows);  // of the next tile
    __m512i w[8];
    unpack<F>(group, w);
    const __m512 s = scales_of(scales, g);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const int8_t* a = q + (i * n + g) * kGroup;
      __m512i dot = _mm512_set1_epi32(-kZero<F> * sum[i * n + g]);
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) dot = _mm512_dpbusd_epi32(dot, w[v], four(a + 4 * v));
      const __m512 factor = _mm512_mul_ps(s, _mm512_set1_ps(scale[i * n + g]));
      total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, total[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    _mm512_mask_storeu_ps(out + (first + i) * out_stride, mask, _mm512_add_ps(total[i], _mm512_setzero_ps()));
  }
}

// R rows of x from `first` on with bf16 weights.
template <Format F, int R>
inline void bf16_rows(const uint8_t* tile, const Rows& x, int64_t first, float* out, int64_t out_stride,
                      __mmask16 mask) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
  const float* a = x.f + first * x.f_stride;
  __m512 even[R], odd[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) even[i] = odd[i] = _mm512_setzero_ps();
  for (int64_t v = 0; v < groups(x.cols) * kGroup / 2; ++v) {
    prefetch(tile + v * 64 + kAhead, 64);
    const __m512i pair = _mm512_load_si512(tile + v * 64);
    const __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    const __m512 w1 = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      even[i] = _mm512_fmadd_ps(w0, _mm512_set1_ps(a[i * x.f_stride + 2 * v]), even[i]);
      odd[i] = _mm512_fmadd_ps(w1, _mm512_set1_ps(a[i * x.f_stride + 2 * v + 1]), odd[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    _mm512_mask_storeu_ps(out + (first + i) * out_stride, mask, _mm512_add_ps(even[i], odd[i]));
  }
}

template <Format F, int R>
inline void some_rows(const uint8_t* tile, const Rows& x, int64_t first, float* out, int64_t out_stride,
                      __mmask16 mask) {
  if constexpr (F == Format::bf16) {
    bf16_rows<F, R>(tile, x, first, out, out_stride, mask);
  } else {
    integer_rows<F, R>(tile, x, first, out, out_stride, mask);
  }
}

template <Format F>
inline void all_rows(const uint8_t* tile, const Rows& x, float* out, int64_t out_stride, __mmask16 mask) {
  using Some = void (*)(const uint8_t*, const Rows&, int64_t, float*, int64_t, __mmask16);
  static constexpr Some kSome[] = {some_rows<F, 1>, some_rows<F, 2>, some_rows<F, 3>, some_rows<F, 4>,
                                   some_rows<F, 5>, some_rows<F, 6>, some_rows<F, 7>, some_rows<F, 8>};
  for (int64_t first = 0; first < x.m; first += 8) {
    const int64_t count = x.m - first < 8 ? x.m - first : 8;
    kSome[count - 1](tile, x, first, out, out_stride, mask);
  }
}

inline void vector_product(Format format, const uint8_t* tile, const Rows& x, float* out, int64_t out_stride,
                           int64_t width) {
  const __mmask16 mask = columns(width);
  if (format == Format::q4) return all_rows<Format::q4>(tile, x, out, out_stride, mask);
  if (format == Format::q8) return all_rows<Format::q8>(tile, x, out, out_stride, mask);
  all_rows<Format::bf16>(tile, x, out, out_stride, mask);
}

#ifndef GODWIT_AMX
inline void tile_products(Format format, const uint8_t* tiles, int64_t count, const Rows& x, float* out,
                          int64_t out_stride, int64_t width) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t left = width - t * kTileRows;
    vector_product(format, tiles + t * tile_bytes(format, x.cols), x, out + t * kTileRows, out_stride,
                   left < kTileRows ? left : kTileRows);
  }
}
#endif
