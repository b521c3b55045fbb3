// Products of tiles with the tile unit. Included after tiles_avx512.h, which computes what is too small
// for it.

// ---- q8 ----------------------------------------------------------------------------------------------

// Groups unpacked at a time: 16 KB of signed codes, which stay in the first-level cache while all rows
// pass by.
constexpr int64_t kUnpacked = 32;
constexpr int64_t kTogether = 4;  // tiles unpacked at a time
constexpr int64_t kFewest = 8;    // rows from which on the unit is faster than vectors

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers 0 to 3 hold sums [rows][16], 4 and 5 activations [rows][32], 6 and 7 codes [8][16 rows x 4
// columns].
inline void configure(int64_t rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = i == 4 || i == 5 ? 32 : 64;
    config.rows[i] = i < 6 ? static_cast<uint8_t>(rows) : 8;
  }
  __asm__ volatile("" ::"r"(&config) : "memory");  // gcc takes the instruction to read 8 bytes of it
  _tile_loadconfig(&config);
}

inline void unpack_signed(const uint8_t* codes, int64_t count, int8_t* out) {
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(128));
  for (int64_t at = 0; at < count * code_bytes(Format::q8); at += 64) {
    _mm512_store_si512(out + at, _mm512_sub_epi8(_mm512_load_si512(codes + at), zero));
  }
}

// Scales [16 rows][16 groups] at distance `stride` to [16 groups][16 rows]; rows and groups that are not
// there give zero.
inline void transpose_scales(const float* from, int64_t stride, int64_t rows, int64_t count, float* to) {
  const auto mask = static_cast<__mmask16>(count < 16 ? (1U << count) - 1 : 0xffffU);
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i)
    a[i] = _mm512_maskz_loadu_ps(i < rows ? mask : __mmask16{0}, from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  for (int half = 0; half < 16; half += 8) {
    for (int i = half; i < half + 4; ++i) {
      b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
      b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_store_ps(to + 16 * i, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
    _mm512_store_ps(to + 16 * (i + 8), _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
  }
}

// Up to 16 rows of activations and a piece of a tile's groups.
struct TilePiece {
  const int8_t* codes;  // unpacked
  const uint8_t* w_scales;
  const int8_t* q;
  int64_t q_stride, count, rows;
  bool first, last;     // of the tile's pieces
  const uint8_t* next;  // what is unpacked after this piece, fetched meanwhile; or null
  int64_t next_bytes;   // of two groups
  alignas(64) float x_scales[kUnpacked * 16];  // [group][row]
};

// total[i] += float(sums of row i) * (scale of the weights * scale of the row)
template <int R>
__attribute__((always_inline)) inline void add_group(const int32_t* sums, const uint8_t* w_scales,
                                                     const float* x_scales, __m512* total) {
  const __m512 s = scales_of(w_scales, 0);
  __asm__("" : "+r"(sums));  // one pointer; gcc would keep a register for every row
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const __m512 value = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_load_si512(sums + 16 * i));
    total[i] = _mm512_fmadd_ps(value, _mm512_mul_ps(s, _mm512_set1_ps(x_scales[i])), total[i]);
  }
}

// The last R of p.rows rows on top of what out holds or, in the first piece, of zero. The tile unit is two
// groups ahead of the additions.
template <int R>
inline void tile_rows(const TilePiece& p, float* out, int64_t out_stride, __mmask16 mask) {
  alignas(64) int32_t sums[4][16 * 16];
  __m512 total[R];
  const int64_t skip = p.rows - R, q_stride = p.q_stride;
  const int8_t *q = p.q, *codes = p.codes;
  const float* x_scales = p.x_scales + skip;
  const uint8_t* w_scales = p.w_scales;
  const uint8_t* next = p.next;
  int32_t *even = sums[0], *odd = sums[1];
  out += skip * out_stride;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    total[i] = p.first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, out + i * out_stride);
  }
  _tile_zero(0);
  _tile_loadd(4, q, q_stride);
  _tile_loadd(6, codes, 64);
  _tile_dpbssd(0, 4, 6);
  _tile_zero(1);
  _tile_loadd(5, q + kGroup, q_stride);
  _tile_loadd(7, codes + 512, 64);
  _tile_dpbssd(1, 5, 7);
  _tile_stored(0, even, 64);
  for (int64_t g = 2; g < p.count; g += 2) {
    q += 2 * kGroup;
    codes += 1024;
    if (next != nullptr) {
      prefetch(next, p.next_bytes);
      next += p.next_bytes;
    }
    _tile_zero(0);
    _tile_loadd(4, q, q_stride);
    _tile_loadd(6, codes, 64);
    _tile_dpbssd(0, 4, 6);
    add_group<R>(even + 16 * skip, w_scales, x_scales, total);
    _tile_stored(1, odd, 64);
    _tile_zero(1);
    _tile_loadd(5, q + kGroup, q_stride);
    _tile_loadd(7, codes + 512, 64);
    _tile_dpbssd(1, 5, 7);
    add_group<R>(odd + 16 * skip, w_scales + 32, x_scales + 16, total);
    even = sums[g & 2], odd = even + 256;
    _tile_stored(0, even, 64);
    w_scales += 64;
    x_scales += 32;
  }
  _tile_stored(1, odd, 64);
  add_group<R>(even + 16 * skip, w_scales, x_scales, total);
  add_group<R>(odd + 16 * skip, w_scales + 32, x_scales + 16, total);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const __m512 done = p.last ? _mm512_add_ps(total[i], _mm512_setzero_ps()) : total[i];
    _mm512_mask_storeu_ps(out + i * out_stride, mask, done);
  }
}

// At most kTogether of the tiles of a matrix side by side, `width` columns in all: rows of activations and
// their scales come once for all of them.
inline void q8_block(const uint8_t* tiles, int64_t num, const Rows& x, float* out, int64_t out_stride,
                     int64_t width) {
  constexpr Format F = Format::q8;
  using Some = void (*)(const TilePiece&, float*, int64_t, __mmask16);
  static constexpr Some kSome[] = {tile_rows<1>,  tile_rows<2>,  tile_rows<3>,  tile_rows<4>,
                                   tile_rows<5>,  tile_rows<6>,  tile_rows<7>,  tile_rows<8>,
                                   tile_rows<9>,  tile_rows<10>, tile_rows<11>, tile_rows<12>,
                                   tile_rows<13>, tile_rows<14>, tile_rows<15>, tile_rows<16>};
  alignas(64) int8_t codes[kTogether][kUnpacked * 512];
  TilePiece p;
  const int64_t n = groups(x.cols), bytes = tile_bytes(F, x.cols);
  p.q_stride = n * kGroup;
  p.rows = x.m < 16 ? x.m : 16;
  configure(p.rows);
  for (int64_t from = 0; from < n; from += kUnpacked) {
    p.count = n - from < kUnpacked ? n - from : kUnpacked;
    p.first = from == 0;
    p.last = from + p.count == n;
    for (int64_t t = 0; t < num; ++t) {
      unpack_signed(tiles + t * bytes + from * code_bytes(F), p.count, codes[t]);
    }
    __asm__ volatile("" ::: "memory");  // the tile loads do not say that they read memory
    p.next = num > 1 ? nullptr : tiles + (p.last ? bytes : (from + kUnpacked) * code_bytes(F));
    p.next_bytes = 2 * code_bytes(F);
    for (int64_t done = 0; done < x.m; done += 16) {
      // What is left is computed as the last of 16 rows, so that one shape of registers serves all.
      const int64_t left = x.m - done < 16 ? x.m - done : 16, top = done + left - p.rows;
      p.q = x.q8.q + (top * n + from) * kGroup;
      for (int64_t g = 0; g < p.count; g += 16) {
        transpose_scales(x.q8.scale + top * n + from + g, n, p.rows, p.count - g, p.x_scales + 16 * g);
      }
      for (int64_t t = 0; t < num; ++t) {
        p.codes = codes[t];
        p.w_scales = tiles + t * bytes + n * code_bytes(F) + from * 2 * kTileRows;
        float* place = out + top * out_stride + t * kTileRows;
        kSome[left - 1](p, place, out_stride, columns(width - t * kTileRows));
      }
      p.next = nullptr;
    }
  }
  _tile_release();
}

inline void q8_products(const uint8_t* tiles, int64_t count, const Rows& x, float* out, int64_t out_stride,
                        int64_t width) {
  const int64_t step = x.m <= 32 ? 1 : kTogether;  // few rows: one tile's codes stay close
  for (int64_t t = 0; t < count; t += step) {
    q8_block(tiles + t * tile_bytes(Format::q8, x.cols), count - t < step ? count - t : step, x,
             out + t * kTileRows, out_stride, width - t * kTileRows);
  }
}

// ---- q4 ----------------------------------------------------------------------------------------------

// Two tiles side by side, a span at a time: the codes of the next span are unpacked while the unit works on
// this one, and the sums of a block of rows become floats while it works on the next block.

constexpr int64_t kSpanBytes = kSpan * kGroup * kTileRows;  // of a tile's unpacked span
constexpr int64_t kSumRows = 256;                           // of float sums at a time: 32 KB

// Registers 0 to 3 hold sums [rows][16], 4 and 5 activations [rows][64], 6 and 7 weights [16][16 rows x 4
// columns].
inline void configure_spans(int64_t rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = i < 6 ? static_cast<uint8_t>(rows) : 16;
  }
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// One span of the N tiles at hand.
template <int N>
struct SpanOfTiles {
  const uint8_t *codes = nullptr, *steps = nullptr, *scales = nullptr;  // of the first tile
  int64_t groups = 0, span = 0, tile_bytes = 0;

  SpanOfTiles(const uint8_t* tiles, int64_t at, const Rows& x) {
    const int64_t n = godwit::groups(x.cols), num = spans(x.cols);
    tile_bytes = godwit::tile_bytes(Format::q4, x.cols);
    span = at % num;
    const uint8_t* tile = tiles + at / num * N * tile_bytes;
    codes = tile + span * kSpan * 256;
    steps = tile + n * 256 + span * kSpan * kTileRows;
    scales = tile + n * (256 + kTileRows) + span * 2 * kTileRows;
    groups = n - span * kSpan < kSpan ? n - span * kSpan : kSpan;
  }
};

// Signed weights of groups [begin, end) of N tiles to out [N][kSpanBytes]: codes times sizes less the zeros.
template <int N>
inline void unpack_groups(const SpanOfTiles<N>& from, int64_t begin, int64_t end, int8_t* out) {
  for (; begin < end; begin += 4) {
    const int64_t count = end - begin < 4 ? end - begin : 4;
#pragma GCC unroll 2
    for (int t = 0; t < N; ++t) {
      const Steps step(from.steps + t * from.tile_bytes + begin * kTileRows, count);
      for (int64_t g = 0; g < count; ++g) {
        const __m512i zero = spread(step.zero + 16 * g, rows_in(0));
        const uint8_t* group = from.codes + t * from.tile_bytes + (begin + g) * 256;
        prefetch(group + kAhead, 256);
        __m512i w[8];
        unpack_sized(group, step.size + 16 * g, step.high + 16 * g, w);
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
          _mm512_store_si512(out + t * kSpanBytes + (begin + g) * 512 + 64 * v, _mm512_sub_epi8(w[v], zero));
        }
      }
    }
  }
}

// One span of 16 rows: products in registers 0 and 1 or 2 and 3, by turns, the second one for a second tile.
template <int N, int P>
inline void multiply_span(const int8_t* q, int64_t q_stride, const int8_t* codes, int64_t count) {
  if constexpr (P == 0) {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
  } else {
    _tile_zero(2);
    if constexpr (N > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < count / 2; ++k) {
    _tile_loadd(4, q + 64 * k, q_stride);
    _tile_loadd(6, codes + 1024 * k, 64);
    if constexpr (P == 0) {
      _tile_dpbssd(0, 4, 6);
    } else {
      _tile_dpbssd(2, 4, 6);
    }
    if constexpr (N > 1) {
      _tile_loadd(7, codes + kSpanBytes + 1024 * k, 64);
      if constexpr (P == 0) {
        _tile_dpbssd(1, 4, 7);
      } else {
        _tile_dpbssd(3, 4, 7);
      }
    }
  }
}

// What multiply_span left, as sums [N][16 rows][16].
template <int N, int P>
inline void store_span(int32_t* sums) {
  if constexpr (P == 0) {
    _tile_stored(0, sums, 64);
    if constexpr (N > 1) _tile_stored(1, sums + 256, 64);
  } else {
    _tile_stored(2, sums, 64);
    if constexpr (N > 1) _tile_stored(3, sums + 256, 64);
  }
}

// Some rows of a span whose products are on the way.
template <int N>
struct SpanRows {
  int64_t skipped = 0, rows = 0;    // rows of the sums that are not, and that are wanted
  const float* w_scales = nullptr;  // [N][16]
  const float* x_scales = nullptr;  // of the first row
  int64_t x_stride = 0;
  bool first = false, last = false;  // of the spans
  float* total = nullptr;            // [rows][N][16]
  float* out = nullptr;              // where totals go after the last span
  int64_t out_stride = 0;
  __mmask16 mask[N] = {};
};

// total = float(sum) * (scale of the weights * scale of the row) on top of what it holds
template <int N>
inline void add_span(const int32_t* sums, const SpanRows<N>& p) {
  __m512 scale[N];
  for (int t = 0; t < N; ++t) scale[t] = _mm512_load_ps(p.w_scales + 16 * t);
  const __mmask16 holds = p.first ? 0 : 0xffff;
  // In variables of their own: what is stored here might be p for all the compiler knows.
  const float* x_scale = p.x_scales;
  float* total = p.total;
  const int64_t rows = p.rows, x_stride = p.x_stride;
  sums += 16 * p.skipped;
#pragma GCC unroll 4
  for (int64_t i = 0; i < rows; ++i, x_scale += x_stride, sums += 16, total += N * 16) {
    const __m512 row = _mm512_set1_ps(*x_scale);
#pragma GCC unroll 2
    for (int t = 0; t < N; ++t) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 256 * t));
      const __m512 before = _mm512_maskz_load_ps(holds, total + 16 * t);
      _mm512_store_ps(total + 16 * t, _mm512_fmadd_ps(sum, _mm512_mul_ps(scale[t], row), before));
    }
  }
  if (!p.last) return;
  for (int t = 0; t < N; ++t) {
    const float* from = p.total + 16 * t;
    float* out = p.out + t * kTileRows;
    const __mmask16 mask = p.mask[t];
    const int64_t stride = p.out_stride;
    for (int64_t i = 0; i < rows; ++i, from += N * 16, out += stride) {
      _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(_mm512_load_ps(from), _mm512_setzero_ps()));
    }
  }
}

// Three steps at a time: products of these rows, sums of those before to memory, those of the ones before
// them added up.
template <int N>
struct SpanPipe {
  alignas(64) int32_t sums[2][N * 256];
  SpanRows<N> rows[2];
  int64_t step = 0;

  void multiply(const SpanRows<N>& next, const int8_t* q, int64_t q_stride, const int8_t* codes,
                int64_t count) {
    if (step % 2 == 0) {
      multiply_span<N, 0>(q, q_stride, codes, count);
    } else {
      multiply_span<N, 1>(q, q_stride, codes, count);
    }
    finish_before();
    rows[step % 2] = next;
    ++step;
  }
  void finish_before() {
    const int64_t parity = step % 2;
    if (step >= 2) add_span(sums[parity], rows[parity]);
    if (parity == 0) {
      if (step >= 1) store_span<N, 1>(sums[1]);
    } else {
      store_span<N, 0>(sums[0]);
    }
  }
  void finish() {
    finish_before();
    if (step >= 1) add_span(sums[(step - 1) % 2], rows[(step - 1) % 2]);
  }
};

// Products of up to kSumRows rows with `num` times N tiles.
template <int N>
inline void q4_block(const uint8_t* tiles, int64_t num, const Rows& x, float* out, int64_t out_stride,
                     int64_t width) {
  alignas(64) int8_t codes[2][N * kSpanBytes];
  alignas(64) float totals[kSumRows * N * 16], w_scales[4][N * 16];
  const int64_t n = groups(x.cols), num_spans = spans(x.cols), q_stride = n * kGroup;
  const int64_t rows = x.m < 16 ? x.m : 16, blocks = (x.m + 15) / 16;
  SpanPipe<N> pipe;
  const SpanOfTiles<N> first(tiles, 0, x);
  unpack_groups(first, 0, first.groups, codes[0]);
  for (int64_t at = 0; at < num * num_spans; ++at) {
    const SpanOfTiles<N> now(tiles, at, x), next(tiles, at + 1, x);
    const int64_t to_unpack = at + 1 < num * num_spans ? next.groups : 0;
    const int64_t share = (to_unpack + blocks - 1) / blocks;
    const int64_t column = at / num_spans * N * kTileRows;
    SpanRows<N> some;
    some.w_scales = w_scales[at % 4];
    some.x_stride = num_spans;
    some.first = now.span == 0;
    some.last = now.span + 1 == num_spans;
    some.out_stride = out_stride;
    for (int t = 0; t < N; ++t) {
      _mm512_store_ps(w_scales[at % 4] + 16 * t, scales_of(now.scales + t * now.tile_bytes, 0));
      some.mask[t] = columns(width - column - t * kTileRows);
    }
    __asm__ volatile("" ::: "memory");  // the tile loads do not say that they read memory
    for (int64_t b = 0, g = 0; b < blocks; ++b) {
      // What is left is computed as the last of 16 rows, so that one shape of registers serves all.
      const int64_t done = 16 * b;
      some.rows = x.m - done < 16 ? x.m - done : 16;
      some.skipped = rows - some.rows;
      some.x_scales = x.q4.scale + done * num_spans + now.span;
      some.total = totals + done * N * 16;
      some.out = out + done * out_stride + column;
      const int8_t* q = x.q4.q + (done - some.skipped) * q_stride + now.span * kSpan * kGroup;
      pipe.multiply(some, q, q_stride, codes[at % 2], now.groups);
      const int64_t end = g + share < to_unpack ? g + share : to_unpack;
      unpack_groups(next, g, end, codes[(at + 1) % 2]);
      g = end;
    }
  }
  pipe.finish();
}

inline void q4_products(const uint8_t* tiles, int64_t count, const Rows& x, float* out, int64_t out_stride,
                        int64_t width) {
  const int64_t pairs = count / 2, bytes = tile_bytes(Format::q4, x.cols);
  configure_spans(x.m < 16 ? x.m : 16);
  for (int64_t first = 0; first < x.m;) {
    // No block is left with less than 16 rows, which the registers are set for.
    const int64_t left = x.m - first, m = left <= kSumRows       ? left
                                          : left < kSumRows + 16 ? left - 16
                                                                 : kSumRows;
    const Rows some = slice(x, first, m);
    float* place = out + first * out_stride;
    if (pairs > 0) q4_block<2>(tiles, pairs, some, place, out_stride, width);
    if (count % 2 != 0) {
      const int64_t before = 2 * pairs * kTileRows;
      q4_block<1>(tiles + 2 * pairs * bytes, 1, some, place + before, out_stride, width - before);
    }
    first += m;
  }
  _tile_release();
}

inline void tile_products(Format format, const uint8_t* tiles, int64_t count, const uint8_t* after,
                          const Rows& x, float* out, int64_t out_stride, int64_t width) {
  if (format == Format::bf16 || x.m < kFewest) {
    vector_products(format, tiles, count, after, x, out, out_stride, width);
  } else if (format == Format::q4) {
    q4_products(tiles, count, x, out, out_stride, width);
  } else {
    q8_products(tiles, count, x, out, out_stride, width);
  }
}
