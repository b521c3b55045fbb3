// Products of tiles with AVX-512 and VNNI. Included after matmul-inl.h. A register holds 16 rows x 4
// columns.

// A core has some fifty lines under way at a time, and its own prefetchers keep that many only over several
// streams of addresses, since each of them begins anew at every page. So few rows take four runs of tiles at
// once, one stream each, fetched this much ahead.
constexpr int64_t kAhead = 3072;  // bytes

inline void fetch(const uint8_t* p, int64_t bytes) {  // into the nearest cache
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

inline void prefetch(const uint8_t* p, int64_t bytes) {  // into the second-level cache
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

// T tiles, one of each stream, and what they meet: R rows of x from `first` on.
struct Run {
  const uint8_t* tiles;
  int64_t apart;         // tiles from one stream to the next
  const uint8_t* after;  // what this thread reads next, as many tiles apart
  const Rows& x;
  int64_t first;
  float* out;
  int64_t out_stride, width;
};

inline void store_columns(const Run& run, int i, int t, __m512 value) {
  const int64_t column = t * run.apart * kTileRows;
  float* out = run.out + (run.first + i) * run.out_stride + column;
  _mm512_mask_storeu_ps(out, columns(run.width - column), value);
}

// With q4 or q8 weights.
template <Format F, int R, int T>
inline void integer_rows(const Run& run) {
  const int64_t n = groups(run.x.cols), bytes = run.apart * tile_bytes(F, run.x.cols);
  const int64_t ahead = kAhead / code_bytes(F);
  const uint8_t* scales = run.tiles + n * code_bytes(F);
  const int8_t* q = run.x.q + run.first * n * kGroup;
  const float* scale = run.x.scale + run.first * n;
  const int32_t* sum = run.x.sum + run.first * n;
  __m512 total[R][T];
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) total[i / T][i % T] = _mm512_setzero_ps();
  for (int64_t g = 0; g < n; ++g) {
    const bool inside = g + ahead < n;  // or else it is time for the tiles that come next
    const uint8_t* fetched =
        (inside ? run.tiles : run.after) + (g + ahead - (inside ? 0 : n)) * code_bytes(F);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const uint8_t* group = run.tiles + t * bytes + g * code_bytes(F);
      fetch(fetched + t * bytes, code_bytes(F));
      if (g % 2 == 0) prefetch(run.after + t * bytes + n * code_bytes(F) + g * 2 * kTileRows, 64);
      __m512i w[8];
      unpack<F>(group, w);
      const __m512 s = scales_of(scales + t * bytes, g);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const int8_t* a = q + (i * n + g) * kGroup;
        __m512i dot = _mm512_set1_epi32(-kZero<F> * sum[i * n + g]);
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) dot = _mm512_dpbusd_epi32(dot, w[v], four(a + 4 * v));
        const __m512 factor = _mm512_mul_ps(s, _mm512_set1_ps(scale[i * n + g]));
        total[i][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, total[i][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) {
    store_columns(run, i / T, i % T, _mm512_add_ps(total[i / T][i % T], _mm512_setzero_ps()));
  }
}

// With bf16 weights.
template <int R, int T>
inline void bf16_rows(const Run& run) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
  const int64_t stride = run.x.f_stride, bytes = run.apart * tile_bytes(Format::bf16, run.x.cols);
  const float* a = run.x.f + run.first * stride;
  __m512 even[R][T], odd[R][T];
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) even[i / T][i % T] = odd[i / T][i % T] = _mm512_setzero_ps();
  for (int64_t v = 0; v < groups(run.x.cols) * kGroup / 2; ++v) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const uint8_t* at = run.tiles + t * bytes + v * 64;
      fetch(at + kAhead, 64);
      const __m512i pair = _mm512_load_si512(at);
      const __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
      const __m512 w1 = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        even[i][t] = _mm512_fmadd_ps(w0, _mm512_set1_ps(a[i * stride + 2 * v]), even[i][t]);
        odd[i][t] = _mm512_fmadd_ps(w1, _mm512_set1_ps(a[i * stride + 2 * v + 1]), odd[i][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) {
    store_columns(run, i / T, i % T, _mm512_add_ps(even[i / T][i % T], odd[i / T][i % T]));
  }
}

template <Format F, int R, int T>
inline void some_rows(const Run& run) {
  if constexpr (F == Format::bf16) {
    bf16_rows<R, T>(run);
  } else {
    integer_rows<F, R, T>(run);
  }
}

// T tiles with all rows, up to 8 of them at a time.
template <Format F, int T>
inline void all_rows(Run run) {
  using Some = void (*)(const Run&);
  constexpr int kMost = 8 / T;  // so that the sums stay in registers
  static constexpr Some kSome[] = {
      some_rows<F, 1, T>,
      some_rows < F,
      kMost < 2 ? 1 : 2,
      T >,
      some_rows < F,
      kMost < 3 ? 1 : 3,
      T >,
      some_rows < F,
      kMost < 4 ? 1 : 4,
      T >,
      some_rows < F,
      kMost < 5 ? 1 : 5,
      T >,
      some_rows < F,
      kMost < 6 ? 1 : 6,
      T >
      , some_rows < F, kMost < 7 ? 1 : 7, T >, some_rows < F, kMost < 8 ? 1 : 8, T > };
  for (; run.first < run.x.m; run.first += kMost) {
    const int64_t left = run.x.m - run.first;
    kSome[(left < kMost ? left : kMost) - 1](run);
  }
}

// `count` tiles as T streams of equal length; gives how many tiles that is.
template <Format F, int T>
inline int64_t streams(const uint8_t* tiles, int64_t count, const uint8_t* after, const Rows& x, float* out,
                       int64_t out_stride, int64_t width) {
  const int64_t apart = count / T, bytes = tile_bytes(F, x.cols);
  for (int64_t j = 0; j < apart; ++j) {
    const uint8_t* next = j + 1 < apart ? tiles + (j + 1) * bytes : after;
    all_rows<F, T>(
        {tiles + j * bytes, apart, next, x, 0, out + j * kTileRows, out_stride, width - j * kTileRows});
  }
  return apart * T;
}

template <Format F>
inline void all_tiles(const uint8_t* tiles, int64_t count, const uint8_t* after, const Rows& x, float* out,
                      int64_t out_stride, int64_t width) {
  const auto some = x.m <= 2 && count >= 4   ? streams<F, 4>
                    : x.m <= 4 && count >= 2 ? streams<F, 2>
                                             : streams<F, 1>;
  const int64_t done = some(tiles, count, after, x, out, out_stride, width);
  streams<F, 1>(tiles + done * tile_bytes(F, x.cols), count - done, after, x, out + done * kTileRows,
                out_stride, width - done * kTileRows);
}

inline void vector_products(Format format, const uint8_t* tiles, int64_t count, const uint8_t* after,
                            const Rows& x, float* out, int64_t out_stride, int64_t width) {
  const auto run = format == Format::q4   ? all_tiles<Format::q4>
                   : format == Format::q8 ? all_tiles<Format::q8>
                                          : all_tiles<Format::bf16>;
  run(tiles, count, after, x, out, out_stride, width);
}

#ifndef GODWIT_AMX
inline void tile_products(Format format, const uint8_t* tiles, int64_t count, const uint8_t* after,
                          const Rows& x, float* out, int64_t out_stride, int64_t width) {
  vector_products(format, tiles, count, after, x, out, out_stride, width);
}
#endif
