// Queries times keys and probabilities times values, for blocks of a partition: loops over a target's pairs
// of bf16. In both products the lanes are independent results, so nothing is summed across a register, and
// the contents of a masked key or a missing row do not affect other lanes.

constexpr int64_t kPartition = 256;  // positions whose softmax is taken as one
constexpr int64_t kPartitionBlocks = kPartition / kBlock;

constexpr int kLaneRows = W == 16 ? 8 : 4;     // rows whose sums are in registers
constexpr int kBlockVectors = 16 / W;          // vectors of a block's 16 keys
constexpr int kScoreBlocks = W == 16 ? 2 : 1;  // blocks of keys side by side
constexpr int kValueVectors = W == 1 ? 8 : 2;  // vectors of dims side by side
static_assert(kPartitionBlocks % kScoreBlocks == 0);

template <int R>
inline void score_rows(const Half* q, int64_t dim, const uint16_t* const* keys, const uint16_t* const* ahead,
                       float* out) {
  constexpr int C = kScoreBlocks * kBlockVectors;
  V sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = set1(0.0F);
  }
  for (int64_t d = 0; d < dim; d += 2) {
    Pairs k[C];
    for (int c = 0; c < C; ++c)
      k[c] = pairs(keys[c / kBlockVectors] + d * kBlock + c % kBlockVectors * 2 * W);
    for (int b = 0; b < kScoreBlocks && ahead != nullptr; ++b) __builtin_prefetch(ahead[b] + d * kBlock);
    for (int r = 0; r < R; ++r) {
      const Pairs both = same_pair(q + r * dim + d);
      for (int c = 0; c < C; ++c) sum[r][c] = dot2(both, k[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(out + r * kPartition + c * W, sum[r][c]);
  }
}

// out [rows, kPartition] = q [rows, dim] times the keys of the blocks. Reads blocks up to the next multiple
// of kScoreBlocks. It also prefetches the values line by line, since their order in the next product suits
// registers rather than memory; this alone doubles the speed of long contexts.
inline void lane_scores(const Half* q, int64_t rows, int64_t dim, const uint16_t* const* keys,
                        const uint16_t* const* values, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; b += kScoreBlocks) {
    const uint16_t* const* ahead = values + b;
    for (int64_t r = 0; r < rows;) {
      const Half* from = q + r * dim;
      float* to = out + r * kPartition + b * kBlock;
      const int64_t left = rows - r;
      if (left >= kLaneRows) {
        score_rows<kLaneRows>(from, dim, keys + b, ahead, to), r += kLaneRows;
      } else if (left >= 4) {
        score_rows<4>(from, dim, keys + b, ahead, to), r += 4;
      } else if (left >= 2) {
        score_rows<2>(from, dim, keys + b, ahead, to), r += 2;
      } else {
        score_rows<1>(from, dim, keys + b, ahead, to), r += 1;
      }
      ahead = nullptr;
    }
  }
}

// C vectors of dims of R rows; a single vector may have fewer than W lanes.
template <int R, int C>
inline void value_rows(const Half* p, int64_t dim, const uint16_t* const* values, int64_t num_blocks,
                       int64_t d, int64_t lanes, float* out) {
  V sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = set1(0.0F);
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t t = 0; t < kBlock; t += 2) {
      const uint16_t* row = values[b] + t * dim + 2 * d;
      Pairs v[C];
      for (int c = 0; c < C; ++c) v[c] = C == 1 ? pairs(row, lanes) : pairs(row + c * 2 * W);
      for (int r = 0; r < R; ++r) {
        const Pairs both = same_pair(p + r * kPartition + b * kBlock + t);
        for (int c = 0; c < C; ++c) sum[r][c] = dot2(both, v[c], sum[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    if (C == 1) {
      store(out + r * dim + d, sum[r][0], lanes);
      continue;
    }
    for (int c = 0; c < C; ++c) store(out + r * dim + d + c * W, sum[r][c]);
  }
}

template <int C>
inline void value_columns(const Half* p, int64_t rows, int64_t dim, const uint16_t* const* values,
                          int64_t num_blocks, int64_t d, int64_t lanes, float* out) {
  int64_t r = 0;
  for (; r + kLaneRows <= rows; r += kLaneRows) {
    value_rows<kLaneRows, C>(p + r * kPartition, dim, values, num_blocks, d, lanes, out + r * dim);
  }
  for (; r + 4 <= rows; r += 4) {
    value_rows<4, C>(p + r * kPartition, dim, values, num_blocks, d, lanes, out + r * dim);
  }
  for (; r + 2 <= rows; r += 2) {
    value_rows<2, C>(p + r * kPartition, dim, values, num_blocks, d, lanes, out + r * dim);
  }
  for (; r < rows; ++r) {
    value_rows<1, C>(p + r * kPartition, dim, values, num_blocks, d, lanes, out + r * dim);
  }
}

// out [rows, dim] = p [rows, kPartition] times the values of the blocks, which are in cache by now. Meanwhile
// the next keys, if any, are prefetched.
inline void lane_values(const Half* p, int64_t rows, int64_t dim, const uint16_t* const* values,
                        int64_t num_blocks, const uint16_t* const* ahead, float* out) {
  constexpr int64_t kWidth = kValueVectors * W;
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    for (int64_t b = 0; ahead != nullptr && b < num_blocks; ++b) {
      for (int64_t i = 0; i < kWidth; i += 2) __builtin_prefetch(ahead[b] + (d + i) * kBlock, 0, 2);
    }
    value_columns<kValueVectors>(p, rows, dim, values, num_blocks, d, W, out);
  }
  for (; d < dim; d += W) {
    value_columns<1>(p, rows, dim, values, num_blocks, d, dim - d < W ? dim - d : W, out);
  }
}
