// Products of q8 tiles with the tile unit. Included after tiles_avx512.h, which computes products that are
// too small for it.

// Groups unpacked at a time: 16 KB of signed codes, which stay in the L1 cache for all rows.
constexpr int64_t kUnpacked = 32;
constexpr int64_t kTogether = 4;  // tiles unpacked at a time

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

// Transposes scales [16 rows][16 groups] at distance `stride` to [16 groups][16 rows]; missing rows and
// groups are zero.
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

// Adds the last R of p.rows rows to out or, in the first piece, to zero. The tile unit is two groups ahead of
// the additions.
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

// At most kTogether of the tiles of a matrix, `width` columns in total: rows of activations and their scales
// are loaded once for all of them.
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
      // The remaining rows are computed as the last of 16 rows, so that one register shape suffices.
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
