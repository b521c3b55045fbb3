// Products of tiles with AVX2. Included after matmul-inl.h. A register holds 8 rows x 4 columns, half a
// tile's rows.

constexpr int64_t kAhead = 4096;  // bytes from what is used to what is fetched into the second-level cache

inline void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

inline int32_t top_bits(const float* x, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int64_t i = 0; i < count * kGroup; i += 16) {
    a = _mm256_max_epi32(a, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + i)), magnitude));
    b = _mm256_max_epi32(b, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + i + 8)), magnitude));
  }
  a = _mm256_max_epi32(a, b);
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

inline int32_t round_group(const float* x, float inverse, int8_t* q) {
  __m256i p[4];
  for (int v = 0; v < 4; ++v) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * v), _mm256_set1_ps(inverse));
    p[v] = _mm256_cvtps_epi32(_mm256_round_ps(scaled, kNearest));
  }
  const __m256i total = _mm256_add_epi32(_mm256_add_epi32(p[0], p[1]), _mm256_add_epi32(p[2], p[3]));
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(p[0], p[1]), _mm256_packs_epi32(p[2], p[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q),
                      _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

inline __m256i four(const int8_t* q) {  // the same four activations for every row of the tile
  int32_t bits;
  std::memcpy(&bits, q, sizeof(bits));
  return _mm256_set1_epi32(bits);
}

inline __m256i half_register(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

// The products of 8 rows x 32 columns of codes in dot [R], as pairs of 16 bits: 15 x 127 x 16 columns fit.
template <int R>
inline void dots_q4(const uint8_t* group, const int8_t* q, int64_t stride, __m256i* dot) {
  const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) dot[i] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m256i both = half_register(group + 64 * v);
    const __m256i low = _mm256_and_si256(both, nibble),
                  high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const int8_t* a = q + i * stride + 4 * v;
      dot[i] = _mm256_add_epi16(dot[i], _mm256_maddubs_epi16(low, four(a)));
      dot[i] = _mm256_add_epi16(dot[i], _mm256_maddubs_epi16(high, four(a + 16)));
    }
  }
}

// The products of 8 rows x 32 columns in dot [R]: |w| x (x with w's sign), since 255 x 127 x 2 would not fit
// in 16 bits.
template <int R>
inline void dots_q8(const uint8_t* group, const int8_t* q, int64_t stride, __m256i* dot) {
  const __m256i zero = _mm256_set1_epi8(static_cast<char>(0x80)), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) dot[i] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v) {
    const __m256i w = _mm256_xor_si256(half_register(group + 64 * v), zero), size = _mm256_abs_epi8(w);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(q + i * stride + 4 * v), w));
      dot[i] = _mm256_add_epi32(dot[i], _mm256_madd_epi16(pairs, ones));
    }
  }
}

inline __m256 scales_of(const uint8_t* scales, int64_t index, int half) {
  const auto* from = reinterpret_cast<const __m128i*>(scales + index * 2 * kTileRows + 16 * half);
  return _mm256_cvtph_ps(_mm_load_si128(from));
}

// A byte of each of 8 rows in 32 bits.
inline __m256i eight(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// The same 16 bits twice.
inline __m256i twice(__m256i words) { return _mm256_or_si256(words, _mm256_slli_epi32(words, 16)); }

template <int R>
inline void store_rows(const __m256 (*total)[R], float* out16) {
  for (int i = 0; i < R; ++i) {
    for (int h = 0; h < 2; ++h) {
      _mm256_store_ps(out16 + 16 * i + 8 * h, _mm256_add_ps(total[h][i], _mm256_setzero_ps()));
    }
  }
}

// Both halves of the tile's rows times R rows of x from `first` on; out16 [R][16].
template <int R>
inline void q8_rows(const uint8_t* tile, const Rows& x, int64_t first, float* out16) {
  const int64_t n = groups(x.cols), bytes = code_bytes(Format::q8);
  const GroupCodes rows = skip(x.q8, x.cols, first);
  __m256 total[2][R];
  for (auto& half : total) {
    for (auto& t : half) t = _mm256_setzero_ps();
  }
  for (int64_t g = 0; g < n; ++g) {
    const uint8_t* group = tile + g * bytes;
    prefetch(group + kAhead, bytes);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256 s = scales_of(tile + n * bytes, g, h);
      __m256i dot[R];
      dots_q8<R>(group + 32 * h, rows.q + g * kGroup, n * kGroup, dot);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const __m256 factor = _mm256_mul_ps(s, _mm256_set1_ps(rows.scale[i * n + g]));
        total[h][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i]), factor, total[h][i]);
      }
    }
  }
  store_rows<R>(total, out16);
}

// The sums of one span for half a tile's rows, sum [R]: sizes times codes times activations, minus the zeros
// times the sums of the activations. `steps` is that of the half's first group.
template <int R>
inline void span_sums(const uint8_t* codes, const uint8_t* steps, const SpanCodes& rows, int64_t n,
                      int64_t count, __m256i* sum) {
  const __m256i nibble = _mm256_set1_epi32(15);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) sum[i] = _mm256_setzero_si256();
  for (int64_t g = 0; g < count; ++g) {
    const __m256i step = eight(steps + g * kTileRows), size = _mm256_and_si256(step, nibble);
    const __m256i zero = _mm256_mullo_epi16(size, _mm256_srli_epi32(step, 4));
    __m256i dot[R];
    dots_q4<R>(codes + g * 256, rows.q + g * kGroup, n * kGroup, dot);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      // The sum of the activations in the low half, against the zero there.
      const __m256i all = _mm256_set1_epi32(static_cast<uint16_t>(rows.sum[i * n + g]));
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(dot[i], twice(size)));
      sum[i] = _mm256_sub_epi32(sum[i], _mm256_madd_epi16(all, zero));
    }
  }
}

template <int R>
inline void q4_rows(const uint8_t* tile, const Rows& x, int64_t first, float* out16) {
  const int64_t n = groups(x.cols), bytes = code_bytes(Format::q4);
  const uint8_t *steps = tile + n * bytes, *scales = steps + n * kTileRows;
  __m256 total[2][R];
  for (auto& half : total) {
    for (auto& t : half) t = _mm256_setzero_ps();
  }
  for (int64_t g = 0, span = 0; g < n; g += kSpan, ++span) {
    const int64_t count = n - g < kSpan ? n - g : kSpan;
    const SpanCodes rows = skip(x.q4, x.cols, first, g);
    prefetch(tile + g * bytes + kAhead, count * bytes);
    for (int h = 0; h < 2; ++h) {
      const __m256 s = scales_of(scales, span, h);
      __m256i sum[R];
      span_sums<R>(tile + g * bytes + 32 * h, steps + g * kTileRows + 8 * h, rows, n, count, sum);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const __m256 factor = _mm256_mul_ps(s, _mm256_set1_ps(rows.scale[i * spans(x.cols)]));
        total[h][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i]), factor, total[h][i]);
      }
    }
  }
  store_rows<R>(total, out16);
}

template <int R>
inline void bf16_rows(const uint8_t* tile, const Rows& x, int64_t first, float* out16) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000U));
  const float* a = x.f + first * x.f_stride;
  __m256 even[2][R], odd[2][R];
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < R; ++i) even[h][i] = odd[h][i] = _mm256_setzero_ps();
  }
  for (int64_t v = 0; v < groups(x.cols) * kGroup / 2; ++v) {
    prefetch(tile + v * 64 + kAhead, 64);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i pair = half_register(tile + v * 64 + 32 * h);
      const __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
      const __m256 w1 = _mm256_castsi256_ps(_mm256_and_si256(pair, upper));
#pragma GCC unroll 2
      for (int i = 0; i < R; ++i) {
        even[h][i] = _mm256_fmadd_ps(w0, _mm256_set1_ps(a[i * x.f_stride + 2 * v]), even[h][i]);
        odd[h][i] = _mm256_fmadd_ps(w1, _mm256_set1_ps(a[i * x.f_stride + 2 * v + 1]), odd[h][i]);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int h = 0; h < 2; ++h) {
      _mm256_store_ps(out16 + 16 * i + 8 * h, _mm256_add_ps(even[h][i], odd[h][i]));
    }
  }
}

inline void vector_product(Format format, const uint8_t* tile, const Rows& x, float* out, int64_t out_stride,
                           int64_t width) {
  using Some = void (*)(const uint8_t*, const Rows&, int64_t, float*);
  static constexpr Some kSome[3][4] = {
      {bf16_rows<1>, bf16_rows<2>, nullptr, nullptr},
      {q8_rows<1>, q8_rows<2>, q8_rows<3>, q8_rows<4>},
      {q4_rows<1>, q4_rows<2>, q4_rows<3>, q4_rows<4>},
  };
  const int64_t most = format == Format::bf16 ? 2 : 4;
  alignas(32) float out16[4 * 16];
  for (int64_t first = 0; first < x.m; first += most) {
    const int64_t count = x.m - first < most ? x.m - first : most;
    kSome[static_cast<int>(format)][count - 1](tile, x, first, out16);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(out + (first + i) * out_stride, out16 + 16 * i, static_cast<size_t>(width) * sizeof(float));
    }
  }
}

inline void tile_products(Format format, const uint8_t* tiles, int64_t count, const uint8_t*, const Rows& x,
                          float* out, int64_t out_stride, int64_t width) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t left = width - t * kTileRows;
    vector_product(format, tiles + t * tile_bytes(format, x.cols), x, out + t * kTileRows, out_stride,
                   left < kTileRows ? left : kTileRows);
  }
}
