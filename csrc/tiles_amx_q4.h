// Products of q4 tiles with the tile unit, and the choice of the unit. Included after tiles_amx.h.

// Two tiles at a time, span by span: the codes of the next span are unpacked while the unit works on this
// one, and the sums of a block of rows are converted to floats while it works on the next block.

constexpr int64_t kSpanBytes = kSpan * kGroup * kTileRows;  // of a tile's unpacked span
constexpr int64_t kSpansAhead = 3;               // from the span that is unpacked to the one that is fetched
constexpr int64_t kSumRows = 256;                // of float sums at a time: 32 KB
constexpr int64_t kFarFloats = 1 << 18;          // of results: more are not in a core's own cache
constexpr int64_t kFewestQ8 = 8, kFewestQ4 = 5;  // rows from which on the unit is faster than vectors

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

// One span of the current N tiles.
template <int N>
struct SpanOfTiles {
  const uint8_t *codes = nullptr, *steps = nullptr, *scales = nullptr;  // of the first tile
  int64_t groups = 0, span = 0, tile_bytes = 0;

  // Span `at` of `num` times N tiles; after the last one, a span of `after`.
  SpanOfTiles(const uint8_t* tiles, int64_t num, const uint8_t* after, int64_t at, const Rows& x)
      : SpanOfTiles(at < num * spans(x.cols) ? tiles : after,
                    at < num * spans(x.cols) ? at : at - num * spans(x.cols), x) {}

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

// Unpacking is done in parts of four groups of a tile, all tiles of four groups before the next four.
template <int N>
inline int64_t num_parts(const SpanOfTiles<N>& span) {
  return N * ((span.groups + 3) / 4);
}

// Writes the signed weights of a part to out [N][kSpanBytes]: codes times sizes minus the zeros. Prefetches
// the same part of `later`.
template <int N>
inline void unpack_part(const SpanOfTiles<N>& from, const SpanOfTiles<N>& later, int64_t part, int8_t* out) {
  const int64_t t = part % N, begin = part / N * 4, tile = t * from.tile_bytes;
  const int64_t count = from.groups - begin < 4 ? from.groups - begin : 4;
  const Steps step(from.steps + tile + begin * kTileRows, count);
  prefetch(later.steps + tile + begin * kTileRows, 64);
  out += t * kSpanBytes + begin * 512;
  for (int64_t g = 0; g < count; ++g) {
    const __m512i zero = spread(step.zero, g);
    prefetch(later.codes + tile + (begin + g) * 256, 256);
    __m512i w[8];
    unpack_sized(from.codes + tile + (begin + g) * 256, step, g, w);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) _mm512_store_si512(out + g * 512 + 64 * v, _mm512_sub_epi8(w[v], zero));
  }
}

// One span of 16 rows: products alternate between registers 0 and 1 and registers 2 and 3, the second of each
// for a second tile. between(k) is the work of the vector units while the tile unit works on part k of count
// / 2: the two only run in parallel if their instructions alternate.
template <int N, int P, typename Between>
inline void multiply_span(const int8_t* q, int64_t q_stride, const int8_t* codes, int64_t count,
                          const Between& between) {
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
    between();
  }
}

// The results of multiply_span, as sums [N][16 rows][16].
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

// Rows of a span whose products are in flight.
template <int N>
struct SpanRows {
  int64_t skipped = 0, rows = 0;    // rows of the sums that are not, and that are wanted
  const float* w_scales = nullptr;  // [N][16]
  const float* x_scales = nullptr;  // of the first row
  int64_t x_stride = 0;
  bool first = false, last = false;  // of the spans
  bool fetch_out = false;            // where totals will go is fetched meanwhile
  float* total = nullptr;            // [rows][N][16]
  float* out = nullptr;              // where totals go after the last span
  int64_t out_stride = 0, width = 0;
};

// Adds float(sum) * (scale of the weights * scale of the row) to total for rows [i, end); after the last
// span, writes to the destination.
template <int N, bool Last>
inline void add_rows(const int32_t* sums, const SpanRows<N>& p, int64_t i, int64_t end) {
  __m512 scale[N];
  __mmask16 mask[N];
  for (int t = 0; t < N; ++t) {
    scale[t] = _mm512_load_ps(p.w_scales + 16 * t);
    mask[t] = columns(p.width - t * kTileRows);
  }
  // Local copies, since the compiler must assume that stores here may alias p.
  const __mmask16 holds = p.first ? 0 : 0xffff;
  const bool fetch_out = p.fetch_out;
  const int64_t x_stride = p.x_stride, out_stride = p.out_stride;
  const float* x_scale = p.x_scales + i * x_stride;
  float *total = p.total + i * N * 16, *out = p.out + i * out_stride;
  sums += 16 * (p.skipped + i);
#pragma GCC unroll 4
  for (; i < end; ++i, x_scale += x_stride, sums += 16, total += N * 16, out += out_stride) {
    const __m512 row = _mm512_set1_ps(*x_scale);
#pragma GCC unroll 2
    for (int t = 0; t < N; ++t) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 256 * t));
      const __m512 before = _mm512_maskz_load_ps(holds, total + 16 * t);
      const __m512 now = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale[t], row), before);
      if constexpr (Last) {
        _mm512_mask_storeu_ps(out + t * kTileRows, mask[t], _mm512_add_ps(now, _mm512_setzero_ps()));
      } else {
        _mm512_store_ps(total + 16 * t, now);
        if (fetch_out) __builtin_prefetch(out + t * kTileRows, 1);
      }
    }
  }
}
template <int N>
inline void add_span(const int32_t* sums, const SpanRows<N>& p, int64_t i, int64_t end) {
  if (i >= end) return;
  if (p.last) {
    add_rows<N, true>(sums, p, i, end);
  } else {
    add_rows<N, false>(sums, p, i, end);
  }
}

// A pipeline of three steps: products of these rows, storing the sums of the previous rows, and adding those
// of the rows before them.
template <int N>
struct SpanPipe {
  alignas(64) int32_t sums[2][N * 256];
  SpanRows<N> rows[2];
  int64_t step = 0;

  // unpack() is called count / 2 times to unpack some of the next span. Returns the entry of these rows for
  // the caller to fill field by field, since reading a copy in wider pieces than it was written would stall
  // on store forwarding.
  template <typename Unpack>
  SpanRows<N>& multiply(const int8_t* q, int64_t q_stride, const int8_t* codes, int64_t count,
                        const Unpack& unpack) {
    const int64_t parity = step % 2;
    if (parity == 0) {
      multiply_and_add<0>(q, q_stride, codes, count, unpack);
    } else {
      multiply_and_add<1>(q, q_stride, codes, count, unpack);
    }
    ++step;
    return rows[parity];
  }
  template <int P, typename Unpack>
  void multiply_and_add(const int8_t* q, int64_t q_stride, const int8_t* codes, int64_t count,
                        const Unpack& unpack) {
    const SpanRows<N>& before = rows[P];
    const int64_t num = step >= 2 ? before.rows : 0;
    int64_t done = 0;
    if (step >= 1) store_span<N, 1 - P>(sums[1 - P]);  // early: what is stored can be read only much later
    multiply_span<N, P>(q, q_stride, codes, count, [&] {
      const int64_t end = done + 4 < num ? done + 4 : num;  // of 16 rows in four parts
      add_span(sums[P], before, done, end);
      done = end;
      unpack();
    });
    add_span(sums[P], before, done, num);
  }
  void finish() {
    for (int64_t left = step < 2 ? step : 2; left > 0; --left) {
      const int64_t parity = (step - left) % 2;
      if (left == 1 && parity == 0) store_span<N, 0>(sums[0]);
      if (left == 1 && parity == 1) store_span<N, 1>(sums[1]);
      add_span(sums[parity], rows[parity], 0, rows[parity].rows);
    }
  }
};

// Products of up to kSumRows rows with `num` times N tiles.
template <int N>
inline void q4_block(const uint8_t* tiles, int64_t num, const uint8_t* after, const Rows& x, float* out,
                     int64_t out_stride, int64_t width) {
  alignas(64) int8_t codes[2][N * kSpanBytes];
  alignas(64) float totals[kSumRows * N * 16], w_scales[4][N * 16];
  const int64_t n = groups(x.cols), num_spans = spans(x.cols), q_stride = n * kGroup;
  const int64_t rows = x.m < 16 ? x.m : 16, blocks = (x.m + 15) / 16;
  const bool far = x.m * out_stride > kFarFloats;
  SpanPipe<N> pipe;
  const SpanOfTiles<N> first(tiles, 0, x);
  for (int64_t part = 0; part < num_parts(first); ++part) {
    unpack_part(first, SpanOfTiles<N>(tiles, num, after, kSpansAhead, x), part, codes[0]);
  }
  for (int64_t at = 0; at < num * num_spans; ++at) {
    const SpanOfTiles<N> now(tiles, at, x), next(tiles, at + 1, x);
    const SpanOfTiles<N> later(tiles, num, after, at + 1 + kSpansAhead, x);
    const int64_t to_unpack = at + 1 < num * num_spans ? num_parts(next) : 0;
    const int64_t column = at / num_spans * N * kTileRows;
    for (int t = 0; t < N; ++t) {
      _mm512_store_ps(w_scales[at % 4] + 16 * t, scales_of(now.scales + t * now.tile_bytes, 0));
    }
    __asm__ volatile("" ::: "memory");              // the tile loads do not say that they read memory
    const int64_t slots = blocks * now.groups / 2;  // among which the parts are spread evenly
    for (int64_t b = 0, part = 0, due = 0; b < blocks; ++b) {
      // The remaining rows are computed as the last of 16 rows, so that one register shape suffices.
      const int64_t done = 16 * b, left = x.m - done < 16 ? x.m - done : 16, skipped = rows - left;
      const int8_t* q = x.q4.q + (done - skipped) * q_stride + now.span * kSpan * kGroup;
      SpanRows<N>& some = pipe.multiply(q, q_stride, codes[at % 2], now.groups, [&] {
        for (due += to_unpack; due >= slots; due -= slots) {
          unpack_part(next, later, part++, codes[(at + 1) % 2]);
        }
      });
      some.skipped = skipped;
      some.rows = left;
      some.w_scales = w_scales[at % 4];
      some.x_scales = x.q4.scale + done * num_spans + now.span;
      some.x_stride = num_spans;
      some.first = now.span == 0;
      some.last = now.span + 1 == num_spans;
      some.fetch_out = far && now.span + 2 == num_spans;
      some.total = totals + done * N * 16;
      some.out = out + done * out_stride + column;
      some.out_stride = out_stride;
      some.width = width - column;
    }
  }
  pipe.finish();
}

inline void q4_products(const uint8_t* tiles, int64_t count, const uint8_t* after, const Rows& x, float* out,
                        int64_t out_stride, int64_t width) {
  const int64_t pairs = count / 2, bytes = tile_bytes(Format::q4, x.cols);
  configure_spans(x.m < 16 ? x.m : 16);
  for (int64_t first = 0; first < x.m;) {
    // Every block has at least 16 rows, as the registers are configured.
    const int64_t left = x.m - first, m = left <= kSumRows       ? left
                                          : left < kSumRows + 16 ? left - 16
                                                                 : kSumRows;
    const Rows some = slice(x, first, m);
    float* place = out + first * out_stride;
    if (pairs > 0) q4_block<2>(tiles, pairs, after, some, place, out_stride, width);
    if (count % 2 != 0) {
      const int64_t before = 2 * pairs * kTileRows;
      q4_block<1>(tiles + 2 * pairs * bytes, 1, after, some, place + before, out_stride, width - before);
    }
    first += m;
  }
  _tile_release();
}

inline void tile_products(Format format, const uint8_t* tiles, int64_t count, const uint8_t* after,
                          const Rows& x, float* out, int64_t out_stride, int64_t width) {
  const int64_t fewest = format == Format::q4 ? kFewestQ4 : kFewestQ8;
  if (format == Format::bf16 || x.m < fewest) {
    vector_products(format, tiles, count, after, x, out, out_stride, width);
  } else if (format == Format::q4) {
    q4_products(tiles, count, after, x, out, out_stride, width);
  } else {
    q8_products(tiles, count, x, out, out_stride, width);
  }
}
