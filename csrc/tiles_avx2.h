// Products of tiles with AVX2. Included after matmul-inl.h. A register holds 8 rows x 4 columns, half a
// tile's rows.

constexpr int64_t kAhead = 4096;  // bytes from what is used to what is fetched into the second-level cache

inline void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

inline void quantize_group(const float* x, int8_t* q, float* scale, int32_t* sum) {
  const __m256i magnitude =
      _mm256_set1_epi32(0x7fffffff);  // as integers magnitudes are in order, NaN the greatest
  __m256 a[4];
  __m256i most = _mm256_setzero_si256();
  for (int v = 0; v < 4; ++v) {
    a[v] = _mm256_loadu_ps(x + 8 * v);
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(a[v]), magnitude));
  }
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  const int32_t bits = _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
  float top;
  std::memcpy(&top, &bits, sizeof(top));
  auto* to = reinterpret_cast<__m256i*>(q);
  if (bits >= 0x7f800000) {
    *scale = __builtin_nanf("");
    *sum = 0;
    return _mm256_storeu_si256(to, _mm256_setzero_si256());
  }
  const __m256 inverse = _mm256_set1_ps(top >= kLeast ? 127.0F / top : 0.0F);
  __m256i p[4];
  for (int v = 0; v < 4; ++v) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    p[v] = _mm256_cvtps_epi32(_mm256_round_ps(_mm256_mul_ps(a[v], inverse), kNearest));
  }
  const __m256i total = _mm256_add_epi32(_mm256_add_epi32(p[0], p[1]), _mm256_add_epi32(p[2], p[3]));
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(p[0], p[1]), _mm256_packs_epi32(p[2], p[3]));
  _mm256_storeu_si256(to, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  *sum = _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
  *scale = top / 127.0F;
}

inline __m256i four(const int8_t* q) {  // the same four activations for every row of the tile
  int32_t bits;
  std::memcpy(&bits, q, sizeof(bits));
  return _mm256_set1_epi32(bits);
}

inline __m256i half_register(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

// Adds the products of 8 rows x 32 columns to dot [R] as pairs of 32 bits or, where they fit, of 16. q4:
// 15 x 127 x 16 columns fit in 16 bits. q8: |w| x (x with w's sign), since 255 x 127 x 2 would not.
template <int R>
inline void dots_q4(const uint8_t* group, const int8_t* q, int64_t stride, __m256i* dot) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
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
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) dot[i] = _mm256_madd_epi16(dot[i], ones);
}

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

// Both halves of the tile's rows times R rows of x from `first` on; out16 [R][16].
template <Format F, int R>
inline void integer_rows(const uint8_t* tile, const Rows& x, int64_t first, float* out16) {
  const int64_t n = groups(x.cols);
  const uint8_t* scales = tile + n * code_bytes(F);
  const int8_t* q = x.q + first * n * kGroup;
  const float* scale = x.scale + first * n;
  const int32_t* sum = x.sum + first * n;
  __m256 total[2][R];
  for (auto& half : total) {
    for (auto& t : half) t = _mm256_setzero_ps();
  }
  for (int64_t g = 0; g < n; ++g) {
    const uint8_t* group = tile + g * code_bytes(F);
    prefetch(group + kAhead, code_bytes(F));
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const auto* half = reinterpret_cast<const __m128i*>(scales + g * 2 * kTileRows + 16 * h);
      const __m256 s = _mm256_cvtph_ps(_mm_load_si128(half));
      __m256i dot[R];
      if constexpr (F == Format::q4) {
        dots_q4<R>(group + 32 * h, q + g * kGroup, n * kGroup, dot);
      } else {
        dots_q8<R>(group + 32 * h, q + g * kGroup, n * kGroup, dot);
      }
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        if constexpr (F == Format::q4)
          dot[i] = _mm256_sub_epi32(dot[i], _mm256_set1_epi32(8 * sum[i * n + g]));
        const __m256 factor = _mm256_mul_ps(s, _mm256_set1_ps(scale[i * n + g]));
        total[h][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i]), factor, total[h][i]);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int h = 0; h < 2; ++h) {
      _mm256_store_ps(out16 + 16 * i + 8 * h, _mm256_add_ps(total[h][i], _mm256_setzero_ps()));
    }
  }
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
      {integer_rows<Format::q8, 1>, integer_rows<Format::q8, 2>, integer_rows<Format::q8, 3>,
       integer_rows<Format::q8, 4>},
      {integer_rows<Format::q4, 1>, integer_rows<Format::q4, 2>, integer_rows<Format::q4, 3>,
       integer_rows<Format::q4, 4>},
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
