// Queries times keys and probabilities times values on tiles: tile registers of 16 rows of 64 bytes. A
// product takes 16 rows of the left side; two of them share every tile of keys or values loaded. The numbers
// of tile registers must be literals: 0 to 3 hold results, 4 and 5 the left side, 6 and 7 the right one.
// Included after tiles_amx.h.

// For `rows` <= 32 rows of `left_bytes` on the left and tiles of left_bytes / 4 rows on the right.
inline void configure_tiles(int64_t rows, int left_bytes) {
  TileConfig config;
  const auto upper = static_cast<uint8_t>(rows < 16 ? rows : 16), lower = static_cast<uint8_t>(rows - upper);
  const uint8_t second = lower > 0 ? lower : upper;  // of results: the second half's rows, or more columns
  const auto depth = static_cast<uint8_t>(left_bytes / 4);
  const uint8_t height[8] = {upper, upper, second, second, upper, second, depth, depth};
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = height[i];
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? left_bytes : 64);
  }
  // The intrinsics of some compilers do not declare the memory they read.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

inline bool tiles_fit(int64_t dim) { return dim % 32 == 0; }

// Like lane_scores. Reads blocks up to the next multiple of 4; prefetches values only with few rows, since
// many rows hide the latency.
inline void tile_scores(const Half* q, int64_t rows, int64_t dim, const uint16_t* const* keys,
                        const uint16_t* const* values, int64_t num_blocks, float* out) {
  constexpr int64_t kStride = kPartition * sizeof(float);
  const int64_t q_stride = dim * 2;
  configure_tiles(rows, 64);
  if (rows <= 16) {
    for (int64_t b = 0; b < num_blocks; b += 4) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t d = 0; d < dim; d += 32) {
        const int64_t at = d * kBlock;
        for (int64_t i = b; i < b + 4; ++i)
          prefetch(reinterpret_cast<const uint8_t*>(values[i] + at), 16 * 64);
        _tile_loadd(4, q + d, q_stride);
        _tile_loadd(6, keys[b] + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, keys[b + 1] + at, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, keys[b + 2] + at, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, keys[b + 3] + at, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
      _tile_stored(0, out + b * kBlock, kStride);
      _tile_stored(1, out + (b + 1) * kBlock, kStride);
      _tile_stored(2, out + (b + 2) * kBlock, kStride);
      _tile_stored(3, out + (b + 3) * kBlock, kStride);
    }
    return;
  }
  for (int64_t b = 0; b < num_blocks; b += 2) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < dim; d += 32) {
      const int64_t at = d * kBlock;
      _tile_loadd(4, q + d, q_stride);
      _tile_loadd(6, keys[b] + at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, keys[b + 1] + at, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, q + 16 * dim + d, q_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out + b * kBlock, kStride);
    _tile_stored(1, out + (b + 1) * kBlock, kStride);
    _tile_stored(2, out + 16 * kPartition + b * kBlock, kStride);
    _tile_stored(3, out + 16 * kPartition + (b + 1) * kBlock, kStride);
  }
}

// Like lane_values.
inline void tile_values(const Half* p, int64_t rows, int64_t dim, const uint16_t* const* values,
                        int64_t num_blocks, const uint16_t* const* ahead, float* out) {
  constexpr int64_t kStride = kPartition * sizeof(Half);
  const int64_t v_stride = dim * 4, out_stride = dim * static_cast<int64_t>(sizeof(float));
  configure_tiles(rows, 32);
  int64_t d = 0;
  for (; rows <= 16 && d + 64 <= dim; d += 64) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const uint16_t* v = values[b] + d * 2;
      // Much of what was prefetched has been evicted, so prefetch again shortly before it is used.
      const uint16_t* soon = values[b + 3 < num_blocks ? b + 3 : b] + d * 2;
      for (int64_t t = 0; t < kBlock / 2; ++t)
        fetch(reinterpret_cast<const uint8_t*>(soon + t * dim * 2), 256);
      if (ahead != nullptr)
        prefetch(reinterpret_cast<const uint8_t*>(ahead[b] + d * kBlock), 64 * kBlock * 2);
      _tile_loadd(4, p + b * kBlock, kStride);
      _tile_loadd(6, v, v_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, v + 32, v_stride);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, v + 64, v_stride);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, v + 96, v_stride);
      _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, out + d, out_stride);
    _tile_stored(1, out + d + 16, out_stride);
    _tile_stored(2, out + d + 32, out_stride);
    _tile_stored(3, out + d + 48, out_stride);
  }
  for (; d < dim; d += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const uint16_t* v = values[b] + d * 2;
      _tile_loadd(4, p + b * kBlock, kStride);
      _tile_loadd(6, v, v_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, v + 32, v_stride);
      _tile_dpbf16ps(1, 4, 7);
      if (rows > 16) {
        _tile_loadd(5, p + 16 * kPartition + b * kBlock, kStride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out + d, out_stride);
    _tile_stored(1, out + d + 16, out_stride);
    if (rows > 16) {
      _tile_stored(2, out + 16 * dim + d, out_stride);
      _tile_stored(3, out + 16 * dim + d + 16, out_stride);
    }
  }
}
