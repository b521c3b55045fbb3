// Products of tiles with AVX-512 and VNNI. Included after matmul-inl.h. A register holds 16 rows x 4
// columns.

constexpr int64_t kAhead = 4096;  // bytes from what is used to what is fetched into the second-level cache

inline void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

inline int32_t top_bits(const float* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i a = _mm512_setzero_si512(), b = a;
  for (int64_t g = 0; g < count; ++g) {
    const float* p = x + g * kGroup;
    a = _mm512_max_epi32(a, _mm512_and_si512(_mm512_castps_si512(_mm512_loadu_ps(p)), magnitude));
    b = _mm512_max_epi32(b, _mm512_and_si512(_mm512_castps_si512(_mm512_loadu_ps(p + 16)), magnitude));
  }
  return _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
}

inline int32_t round_group(const float* x, float inverse, int8_t* q) {
  const __m512 factor = _mm512_set1_ps(inverse);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i a = _mm512_cvt_roundps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), factor), kNearest);
  const __m512i b = _mm512_cvt_roundps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), factor), kNearest);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtepi32_epi8(b));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
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

// R rows of x from `first` on with q8 weights.
template <int R>
inline void q8_rows(const uint8_t* tile, const Rows& x, int64_t first, float* out, int64_t out_stride,
                    __mmask16 mask) {
  const int64_t n = groups(x.cols), bytes = code_bytes(Format::q8);
  const uint8_t* scales = tile + n * bytes;
  const GroupCodes rows = skip(x.q8, x.cols, first);
  __m512 total[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) total[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < n; ++g) {
    const uint8_t* group = tile + g * bytes;
    prefetch(group + kAhead, bytes);
    prefetch(scales + tile_bytes(Format::q8, x.cols) + g * 2 * kTileRows, 2 * kTileRows);  // of the next tile
    __m512i w[8];
    unpack<Format::q8>(group, w);
    const __m512 s = scales_of(scales, g);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const int8_t* a = rows.q + (i * n + g) * kGroup;
      __m512i dot = _mm512_set1_epi32(-128 * rows.sum[i * n + g]);
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) dot = _mm512_dpbusd_epi32(dot, w[v], four(a + 4 * v));
      const __m512 factor = _mm512_mul_ps(s, _mm512_set1_ps(rows.scale[i * n + g]));
      total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, total[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    _mm512_mask_storeu_ps(out + (first + i) * out_stride, mask, _mm512_add_ps(total[i], _mm512_setzero_ps()));
  }
}

// The steps of up to four groups in bytes [group][row]: sizes, sizes times 16, and sizes times the codes of
// zero. One of 16 bytes is spread over a register's rows by spread.
struct Steps {
  alignas(64) uint8_t size[64], high[64], zero[64];

  Steps(const uint8_t* steps, int64_t count) {
    const auto mask = static_cast<__mmask64>(count < 4 ? (uint64_t{1} << (16 * count)) - 1 : ~uint64_t{0});
    const __m512i both = _mm512_maskz_loadu_epi8(mask, steps), nibble = _mm512_set1_epi8(15);
    const __m512i low = _mm512_and_si512(both, nibble), odd = _mm512_set1_epi16(static_cast<int16_t>(0xff00));
    const __m512i code = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    // A product of two nibbles stays in its byte: even and odd bytes apart.
    const __m512i even = _mm512_mullo_epi16(_mm512_andnot_si512(odd, low), code);
    const __m512i other = _mm512_mullo_epi16(_mm512_and_si512(odd, low), _mm512_srli_epi16(code, 8));
    _mm512_store_si512(size, low);
    _mm512_store_si512(high, _mm512_slli_epi16(low, 4));
    _mm512_store_si512(zero, _mm512_or_si512(_mm512_andnot_si512(odd, even), other));
  }
};

inline __m512i spread(const uint8_t* bytes, __m512i pick) {
  const __m128i rows = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(rows), pick);
}

// For spread: register r has `pattern` plus r in its bytes; 0x80 makes a byte 0.
inline __m512i rows_in(uint32_t pattern) {
  const __m512i r = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i all = _mm512_mullo_epi32(r, _mm512_set1_epi32(0x01010101));
  return _mm512_add_epi32(all, _mm512_set1_epi32(static_cast<int32_t>(pattern)));
}

// The eight registers of a group's codes times the sizes of their rows, at most 225: one multiplication for
// two bytes, without a carry from one to the other, and for the high nibbles as 16 codes times 4096 sizes
// over 65536.
inline void unpack_sized(const uint8_t* group, const uint8_t* size, const uint8_t* high, __m512i* w) {
  const __m512i low_factor = spread(size, rows_in(0x80008000)),
                high_factor = spread(high, rows_in(0x00800080));
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m512i both = _mm512_load_si512(group + 64 * v);
    w[v] = _mm512_mullo_epi16(_mm512_and_si512(both, nibble), low_factor);
    w[v + 4] = _mm512_mulhi_epu16(_mm512_andnot_si512(nibble, both), high_factor);
  }
}

// R rows of x from `first` on with q4 weights. A span is one sum of codes times sizes times activations, less
// the zeros times the sums of the activations.
template <int R>
inline void q4_rows(const uint8_t* tile, const Rows& x, int64_t first, float* out, int64_t out_stride,
                    __mmask16 mask) {
  constexpr int kSums = R == 1 ? 4 : R <= 4 ? 2 : 1;  // of a row: additions to one wait for each other
  constexpr int64_t kBytes = 256;
  const int64_t n = groups(x.cols);
  const uint8_t *steps = tile + n * kBytes, *scales = steps + n * kTileRows;
  const SpanCodes rows = skip(x.q4, x.cols, first);
  __m512 total[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) total[i] = _mm512_setzero_ps();
  for (int64_t begin = 0, span = 0; begin < n; begin += kSpan, ++span) {
    const int64_t end = begin + kSpan < n ? begin + kSpan : n;
    __m512i dot[kSums][R];
    for (auto& sums : dot) {
      for (auto& sum : sums) sum = _mm512_setzero_si512();
    }
    prefetch(steps + tile_bytes(Format::q4, x.cols) + begin * kTileRows, kSpan * kTileRows);  // of the next
    for (int64_t g = begin; g < end; g += 2) {
      const Steps step(steps + g * kTileRows, 2);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const uint8_t* group = tile + (g + half) * kBytes;
        const int8_t* a = rows.q + (g + half) * kGroup;
        __m512i w[8];
        prefetch(group + kAhead, kBytes);
        unpack_sized(group, step.size + 16 * half, step.high + 16 * half, w);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
          for (int v = 0; v < 8; ++v) {
            __m512i& sum = dot[v % kSums][i];
            sum = _mm512_dpbusd_epi32(sum, w[v], four(a + i * n * kGroup + 4 * v));
          }
        }
      }
      // The zeros of two groups side by side, with a minus.
      const __m512i pairs = _mm512_or_si512(spread(step.zero, rows_in(0x80808000)),
                                            spread(step.zero + 16, rows_in(0x80008080)));
      const __m512i less = _mm512_sub_epi16(_mm512_setzero_si512(), pairs);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        int32_t sums;
        std::memcpy(&sums, rows.sum + i * n + g, sizeof(sums));
        dot[0][i] = _mm512_dpwssd_epi32(dot[0][i], less, _mm512_set1_epi32(sums));
      }
    }
    const __m512 scale = scales_of(scales, span);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int k = 1; k < kSums; ++k) dot[0][i] = _mm512_add_epi32(dot[0][i], dot[k][i]);
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(rows.scale[i * spans(x.cols) + span]));
      total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[0][i]), factor, total[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    _mm512_mask_storeu_ps(out + (first + i) * out_stride, mask, _mm512_add_ps(total[i], _mm512_setzero_ps()));
  }
}

// R rows of x from `first` on with bf16 weights.
template <int R>
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
    bf16_rows<R>(tile, x, first, out, out_stride, mask);
  } else if constexpr (F == Format::q8) {
    q8_rows<R>(tile, x, first, out, out_stride, mask);
  } else {
    q4_rows<R>(tile, x, first, out, out_stride, mask);
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
