// Products of tiles with AVX-512 and VNNI. Included after matmul-inl.h. A register holds 16 rows x 4
// columns.

// A core can have about fifty cache lines in flight, but its prefetchers only reach that with several streams
// of addresses, since each restarts at every page. So with few rows, four streams of tiles are read at once,
// each prefetched this far ahead.
constexpr int64_t kAhead = 3072;  // bytes

inline void fetch(const uint8_t* p, int64_t bytes) {  // into the nearest cache
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

inline void prefetch(const uint8_t* p, int64_t bytes) {  // into the second-level cache
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

// T tiles, one of each stream, and R rows of x from `first` on.
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

// The group to prefetch while group g of n is computed, `ahead` groups later: of the current tiles, or of the
// next ones.
inline const uint8_t* fetched_at(const Run& run, int64_t g, int64_t ahead, int64_t n, int64_t bytes) {
  return g + ahead < n ? run.tiles + (g + ahead) * bytes : run.after + (g + ahead - n) * bytes;
}

// With q8 weights.
template <int R, int T>
inline void q8_rows(const Run& run) {
  constexpr int64_t kBytes = code_bytes(Format::q8);
  const int64_t n = groups(run.x.cols), apart = run.apart * tile_bytes(Format::q8, run.x.cols);
  const uint8_t* scales = run.tiles + n * kBytes;
  const GroupCodes rows = skip(run.x.q8, run.x.cols, run.first);
  __m512 total[R][T];
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) total[i / T][i % T] = _mm512_setzero_ps();
  for (int64_t g = 0; g < n; ++g) {
    const uint8_t* fetched = fetched_at(run, g, kAhead / kBytes, n, kBytes);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      fetch(fetched + t * apart, kBytes);
      if (g % 2 == 0) prefetch(run.after + t * apart + n * kBytes + g * 2 * kTileRows, 64);
      __m512i w[8];
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) {
        w[v] = _mm512_load_si512(run.tiles + t * apart + g * kBytes + 64 * v);
      }
      const __m512 s = scales_of(scales + t * apart, g);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const int8_t* a = rows.q + (i * n + g) * kGroup;
        __m512i dot = _mm512_set1_epi32(-128 * rows.sum[i * n + g]);
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) dot = _mm512_dpbusd_epi32(dot, w[v], four(a + 4 * v));
        const __m512 factor = _mm512_mul_ps(s, _mm512_set1_ps(rows.scale[i * n + g]));
        total[i][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, total[i][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) {
    store_columns(run, i / T, i % T, _mm512_add_ps(total[i / T][i % T], _mm512_setzero_ps()));
  }
}

// The steps of up to four groups in bytes [group][row]: sizes, sizes times 16, and sizes times the codes of
// zero.
struct Steps {
  __m512i size, high, zero;

  Steps(const uint8_t* steps, int64_t count) {
    const auto mask = static_cast<__mmask64>(count < 4 ? (uint64_t{1} << (16 * count)) - 1 : ~uint64_t{0});
    const __m512i both = _mm512_maskz_loadu_epi8(mask, steps), nibble = _mm512_set1_epi8(15);
    const __m512i odd = _mm512_set1_epi16(static_cast<int16_t>(0xff00));
    const __m512i code = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    size = _mm512_and_si512(both, nibble);
    high = _mm512_slli_epi16(size, 4);
    // A product of two nibbles fits in its byte; even and odd bytes are computed separately.
    const __m512i even = _mm512_mullo_epi16(_mm512_andnot_si512(odd, size), code);
    const __m512i other = _mm512_mullo_epi16(_mm512_and_si512(odd, size), _mm512_srli_epi16(code, 8));
    zero = _mm512_or_si512(_mm512_andnot_si512(odd, even), other);
  }
};

// The sixteen bytes of a group, byte r in register r of the result: in all four bytes, or only in `places`.
inline __m512i spread(__m512i bytes, int64_t group, __mmask64 places = ~__mmask64{0}) {
  const __m512i r = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i row = _mm512_mullo_epi32(r, _mm512_set1_epi32(0x01010101));
  const __m512i pick = _mm512_add_epi8(row, _mm512_set1_epi8(static_cast<char>(16 * group)));
  return _mm512_maskz_permutexvar_epi8(places, pick, bytes);
}
constexpr __mmask64 kEven = 0x5555555555555555, kOdd = ~kEven, kFirst = 0x1111111111111111;  // bytes

// The eight registers of a group's codes times the sizes of their rows, at most 225: one multiplication per
// two bytes, without a carry between them, and for the high nibbles as 16 codes times 4096 sizes divided by
// 65536.
inline void unpack_sized(const uint8_t* codes, const Steps& step, int64_t group, __m512i* w) {
  const __m512i low_factor = spread(step.size, group, kEven), high_factor = spread(step.high, group, kOdd);
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m512i both = _mm512_load_si512(codes + 64 * v);
    w[v] = _mm512_mullo_epi16(_mm512_and_si512(both, nibble), low_factor);
    w[v + 4] = _mm512_mulhi_epu16(_mm512_andnot_si512(nibble, both), high_factor);
  }
}

// Adds the products of two groups of a tile with R rows to `dot`: codes times sizes times activations, minus
// the zeros times the sums of the activations. K sums per row, since additions to one sum wait for each
// other.
template <int R, int K>
inline void add_groups(const uint8_t* codes, const uint8_t* steps, const SpanCodes& rows, int64_t n,
                       __m512i (&dot)[R][K]) {
  const Steps step(steps, 2);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512i w[8];
    unpack_sized(codes + half * code_bytes(Format::q4), step, half, w);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const int8_t* a = rows.q + (i * n + half) * kGroup;
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) dot[i][v % K] = _mm512_dpbusd_epi32(dot[i][v % K], w[v], four(a + 4 * v));
    }
  }
  // The negated zeros of two groups, interleaved.
  const __m512i pairs = _mm512_or_si512(spread(step.zero, 0, kFirst), spread(step.zero, 1, kFirst << 2));
  const __m512i less = _mm512_sub_epi16(_mm512_setzero_si512(), pairs);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    int32_t sums;
    std::memcpy(&sums, rows.sum + i * n, sizeof(sums));
    dot[i][0] = _mm512_dpwssd_epi32(dot[i][0], less, _mm512_set1_epi32(sums));
  }
}

// With q4 weights: a span is one sum of integers.
template <int R, int T>
inline void q4_rows(const Run& run) {
  constexpr int64_t kBytes = code_bytes(Format::q4);
  constexpr int kSums = R * T == 1 ? 4 : R * T <= 4 ? 2 : 1;
  const int64_t n = groups(run.x.cols), num_spans = spans(run.x.cols);
  const int64_t apart = run.apart * tile_bytes(Format::q4, run.x.cols);
  const int64_t steps = n * kBytes, scales = steps + n * kTileRows;  // from the beginning of a tile
  __m512 total[R][T];
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) total[i / T][i % T] = _mm512_setzero_ps();
  for (int64_t span = 0; span < num_spans; ++span) {
    const int64_t begin = span * kSpan, end = begin + kSpan < n ? begin + kSpan : n;
    __m512i dot[T][R][kSums];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      for (auto& sums : dot[t]) {
        for (auto& sum : sums) sum = _mm512_setzero_si512();
      }
      prefetch(run.after + t * apart + steps + begin * kTileRows, kSpan * kTileRows);
      prefetch(run.after + t * apart + scales + span * 2 * kTileRows, 2 * kTileRows);
    }
    for (int64_t g = begin; g < end; g += 2) {
      const SpanCodes rows = skip(run.x.q4, run.x.cols, run.first, g);
      const uint8_t* fetched = fetched_at(run, g, kAhead / kBytes, n, kBytes);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const uint8_t* tile = run.tiles + t * apart;
        fetch(fetched + t * apart, 2 * kBytes);
        add_groups(tile + g * kBytes, tile + steps + g * kTileRows, rows, n, dot[t]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * T; ++i) {
      auto& sums = dot[i % T][i / T];
#pragma GCC unroll 4
      for (int k = 1; k < kSums; ++k) sums[0] = _mm512_add_epi32(sums[0], sums[k]);
      const __m512 row = _mm512_set1_ps(run.x.q4.scale[(run.first + i / T) * num_spans + span]);
      const __m512 factor = _mm512_mul_ps(scales_of(run.tiles + i % T * apart + scales, span), row);
      total[i / T][i % T] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[0]), factor, total[i / T][i % T]);
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
  } else if constexpr (F == Format::q8) {
    q8_rows<R, T>(run);
  } else {
    q4_rows<R, T>(run);
  }
}

// T tiles with all rows, up to 8 / T of them at a time, so that the sums stay in registers.
using Some = void (*)(const Run&);
template <Format F, int R, int T>
constexpr Some kRows = some_rows<F, (R < 8 / T ? R : 8 / T), T>;

template <Format F, int T>
inline void all_rows(Run run) {
  static constexpr Some kSome[] = {kRows<F, 1, T>, kRows<F, 2, T>, kRows<F, 3, T>, kRows<F, 4, T>,
                                   kRows<F, 5, T>, kRows<F, 6, T>, kRows<F, 7, T>, kRows<F, 8, T>};
  constexpr int kMost = 8 / T;
  for (; run.first < run.x.m; run.first += kMost) {
    const int64_t left = run.x.m - run.first;
    kSome[(left < kMost ? left : kMost) - 1](run);
  }
}

// `count` tiles as T streams of equal length; returns how many tiles these have.
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
  // Many rows of floats: 4 at a time stay in the L1 cache.
  const bool two = x.m <= 4 || F == Format::bf16;
  const auto some = x.m <= 2 && count >= 4 ? streams<F, 4>
                    : two && count >= 2    ? streams<F, 2>
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
