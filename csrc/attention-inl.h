// Attention over paged keys and values.
//
// Queries, keys, probabilities and values are bf16, sums float32. The keys of a row are processed in
// partitions of 256 positions counted from position 0: each partition has its own softmax, and partitions are
// joined in ascending order, always by the same formula. So a row's bits do not depend on whether one thread
// computes all partitions or several compute one each, nor on which rows share a block of queries.

#if GODWIT_AVX512
#include "scores_avx512.h"
#else
#include "scores_portable.h"
#endif
// After the pairs of bf16:
#include "scores-inl.h"
#if GODWIT_AMX
#include "scores_amx.h"
#endif

constexpr int64_t kStepTokens = 512;        // taken together through the layer: bounds the scratch memory
constexpr int64_t kBlockRows = 128;         // of queries that share a pass over keys and values
constexpr int64_t kSubRows = 32;            // of these whose scores are in hand at a time
constexpr int64_t kPartialBytes = 8 << 20;  // of partitions' results that wait for being joined

// ---- The two products ------------------------------------------------------------------------------

struct Partition {  // the blocks of one key head, the last one repeated up to 16
  const uint16_t *k[kPartitionBlocks], *v[kPartitionBlocks];
  int64_t num_blocks;
};

// The unit that computes them depends only on the layer, since units differ in the order of their sums.
inline void attention_scores(const Half* q, int64_t rows, int64_t dim, const Partition& keys,
                             int64_t num_blocks, float* out) {
#if GODWIT_AMX
  if (tiles_fit(dim)) return tile_scores(q, rows, dim, keys.k, keys.v, num_blocks, out);
#endif
  lane_scores(q, rows, dim, keys.k, keys.v, num_blocks, out);
}

inline void weighted_values(const Half* p, int64_t rows, int64_t dim, const Partition& keys,
                            int64_t num_blocks, const uint16_t* const* ahead, float* out) {
#if GODWIT_AMX
  if (tiles_fit(dim)) return tile_values(p, rows, dim, keys.v, num_blocks, ahead, out);
#endif
  lane_values(p, rows, dim, keys.v, num_blocks, ahead, out);
}

inline void release_tiles() {
#if GODWIT_AMX
  _tile_release();
#endif
}

// ---- A run of tokens and the queries in it ---------------------------------------------------------

struct AttentionStep {
  const Attention& layer;
  const Batch& batch;
  const PagedCache& cache;
  int64_t first, count;  // tokens of the batch
  int64_t ratio;         // query heads of a key head
  int64_t width;         // of a row of proj
  float* proj;           // [count, width]
  Half* q;               // [kv_heads, count * ratio, D] scaled; row = token * ratio + head of the group
  float* out;            // [count, heads, D] weighted values of the partitions joined so far
  float* top;            // [kv_heads, count * ratio] largest score in them
  float* sum;            // [kv_heads, count * ratio] sum of exp(score - top)
};

struct QueryBlock {  // neighbouring rows of a sequence and a key head
  int64_t seq, head, begin, count;
  int64_t limit;  // row r sees the first limit + r / ratio positions of its sequence
};

inline int64_t limit_of(const AttentionStep& s, const QueryBlock& b, int64_t row) {
  return b.limit + (b.begin + row) / s.ratio;
}
inline int64_t partitions(const AttentionStep& s, const QueryBlock& b) {
  return (limit_of(s, b, b.count - 1) + kPartition - 1) / kPartition;
}

// Returns the number of blocks; `out` may be null.
inline int64_t query_blocks(const AttentionStep& s, QueryBlock* out) {
  int64_t n = 0;
  for (int64_t seq = 0; seq < s.batch.num_seqs; ++seq) {
    const int64_t* cu = s.batch.cu_seqlens;
    const int64_t begin = (cu[seq] > s.first ? cu[seq] - s.first : 0) * s.ratio;
    const int64_t end = (cu[seq + 1] - s.first < s.count ? cu[seq + 1] - s.first : s.count) * s.ratio;
    const int64_t limit = s.batch.seq_lens[seq] - (cu[seq + 1] - s.first) + 1;
    for (int64_t head = 0; head < s.layer.num_kv_heads; ++head) {
      for (int64_t r = begin; r < end; r += kBlockRows, ++n) {
        if (out != nullptr) out[n] = {seq, head, r, end - r < kBlockRows ? end - r : kBlockRows, limit};
      }
    }
  }
  return n;
}

// ---- Before the scores: norms, rotary embedding, the cache -----------------------------------------

// Rotates x [D]: dim i of the first half of the rotated dims pairs with dim i of the second.
inline void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
  for (int64_t i = 0; i < half; i += W) {
    const int64_t n = half - i < W ? half - i : W;
    const V a = load(x + i, n), b = load(x + half + i, n), c = load(cosines + i, n), s = load(sines + i, n);
    store(x + i, sub(mul(a, c), mul(b, s)), n);
    store(x + half + i, add(mul(b, c), mul(a, s)), n);
  }
}

struct HeadWork {  // of a thread
  float *cosines, *sines, *x;
};

inline void prepare_head(const Attention& layer, const float* from, const float* factor,
                         const HeadWork& work) {
  if (factor != nullptr) {
    norm_row(from, factor, layer.dim, layer.eps, work.x);
  } else {
    std::memcpy(work.x, from, static_cast<size_t>(layer.dim) * sizeof(float));
  }
  rotate(work.x, work.cosines, work.sines, layer.rotary_half);
}

// Writes the queries of one token to s.q, its keys and values to the cache.
inline void prepare_token(const AttentionStep& s, int64_t token, const HeadWork& work) {
  const Attention& layer = s.layer;
  const int64_t dim = layer.dim, queries = layer.num_heads * dim;
  const auto position = static_cast<float>(s.batch.positions[s.first + token]);
  for (int64_t i = 0; i < layer.rotary_half; ++i) {
    const float angle = position * layer.inv_freq[i];
    work.cosines[i] = std::cos(angle) * layer.rope_scale;
    work.sines[i] = std::sin(angle) * layer.rope_scale;
  }
  const float* row = s.proj + token * s.width;
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  for (int64_t h = 0; h < layer.num_heads; ++h) {
    prepare_head(layer, row + h * dim, layer.q_norm, work);
    Half* q = s.q + ((h / s.ratio * s.count + token) * s.ratio + h % s.ratio) * dim;
    for (int64_t i = 0; i < dim; ++i) q[i] = round_half(work.x[i] * scale);
  }
  const float* key = row + (layer.gate ? 2 : 1) * queries;
  const float* value = key + layer.num_kv_heads * dim;
  const int64_t slot = s.batch.slot_mapping[s.first + token], place = slot % kBlock;
  for (int64_t h = 0; h < layer.num_kv_heads; ++h) {
    prepare_head(layer, key + h * dim, layer.k_norm, work);
    const int64_t block = (slot / kBlock * layer.num_kv_heads + h) * kBlock * dim;
    uint16_t* k = s.cache.k + block + place * 2;
    uint16_t* v = s.cache.v + block + place / 2 * dim * 2 + place % 2;
    for (int64_t i = 0; i < dim; ++i) k[i / 2 * kBlock * 2 + i % 2] = to_bf16(work.x[i]);
    for (int64_t i = 0; i < dim; ++i) v[i * 2] = to_bf16(value[h * dim + i]);
  }
}

inline void prepare_heads(const AttentionStep& s) {
  parallel(s.count, 4, [&s](int64_t begin, int64_t end, int) {
    const int64_t half = s.layer.rotary_half;
    auto* work =
        static_cast<float*>(thread_scratch(static_cast<size_t>(2 * half + s.layer.dim) * sizeof(float)));
    for (int64_t t = begin; t < end; ++t) prepare_token(s, t, {work, work + half, work + 2 * half});
  });
}

// ---- One partition ---------------------------------------------------------------------------------

inline Partition partition_of(const AttentionStep& s, const QueryBlock& b, int64_t index) {
  const int64_t* table = s.batch.block_tables + b.seq * s.batch.table_width + index * kPartitionBlocks;
  const int64_t end = limit_of(s, b, b.count - 1) - index * kPartition, size = kBlock * s.layer.dim;
  Partition out;
  out.num_blocks = end < kPartition ? (end + kBlock - 1) / kBlock : kPartitionBlocks;
  for (int64_t i = 0; i < kPartitionBlocks; ++i) {
    const int64_t block = table[i < out.num_blocks ? i : out.num_blocks - 1];
    out.k[i] = s.cache.k + (block * s.layer.num_kv_heads + b.head) * size;
    out.v[i] = s.cache.v + (block * s.layer.num_kv_heads + b.head) * size;
  }
  return out;
}

struct ScoreWork {         // of a thread
  float* scores;           // [kSubRows, kPartition]
  Half* probs;             // [kSubRows, kPartition]
  uint16_t* tail;          // [16, D] values of a block that is not full
  float *out, *top, *sum;  // [kSubRows, D], [kSubRows], [kSubRows]
};

inline ScoreWork score_work(int64_t dim) {
  const int64_t cells = kSubRows * kPartition;
  auto* p = static_cast<float*>(
      thread_scratch(static_cast<size_t>(2 * cells + kBlock * dim + kSubRows * (dim + 2)) * sizeof(float)));
  ScoreWork work;
  work.scores = p, p += cells;
  work.probs = reinterpret_cast<Half*>(p), p += cells;
  work.tail = reinterpret_cast<uint16_t*>(p), p += kBlock * dim;
  work.out = p, p += kSubRows * dim;
  work.top = p, p += kSubRows;
  work.sum = p;
  return work;
}

// Converts the first n > 0 of s to probabilities, up to a common factor: p = exp(s - top), zero from n to
// `width`, which is a multiple of 16. Overwrites s.
inline void softmax_row(float* s, int64_t n, int64_t width, Half* p, float* top, float* sum) {
  for (int64_t i = n; i < width && i < n + W; ++i) s[i] = -INFINITY;
  V most = set1(-INFINITY);
  for (int64_t i = 0; i < n; i += W) most = max(most, load(s + i));
  *top = reduce_max(most);
  const V base = set1(*top);
  for (int64_t i = 0; i < n; i += W) store(s + i, exp(sub(load(s + i), base)));
  for (int64_t i = n; i < width; ++i) s[i] = 0;
  V total = set1(0.0F);
  for (int64_t i = 0; i < n; i += W) total = add(total, load(s + i));
  *sum = reduce_add(total);
  round_row(s, width, p);
}

// Rows [row, row + count) of a block of queries against one partition: largest score, sum of exp and weighted
// values of each. Rows that do not attend to the partition get no meaningful result.
inline void attend(const AttentionStep& s, const QueryBlock& b, int64_t index, const Partition& keys,
                   const uint16_t* const* ahead, int64_t row, int64_t count, const ScoreWork& work,
                   float* top, float* sum, float* out) {
  const int64_t dim = s.layer.dim, start = index * kPartition, seen = limit_of(s, b, row + count - 1) - start;
  const int64_t blocks = seen < kPartition ? (seen + kBlock - 1) / kBlock : kPartitionBlocks;
  const Half* q = s.q + (b.head * s.count * s.ratio + b.begin + row) * dim;
  attention_scores(q, count, dim, keys, blocks, work.scores);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t n = limit_of(s, b, row + r) - start;
    Half* p = work.probs + r * kPartition;
    if (n > 0) {
      softmax_row(work.scores + r * kPartition, n < kPartition ? n : kPartition, blocks * kBlock, p, top + r,
                  sum + r);
    } else {
      std::memset(p, 0, static_cast<size_t>(blocks * kBlock) * sizeof(Half));
    }
  }
  weighted_values(work.probs, count, dim, keys, blocks, ahead, out);
}

// All rows of a block of queries against one partition, calling `done(row, count)` after every kSubRows of
// them, with results stored at `to(row)`. `ahead`: the blocks of keys that this thread reads next, or null.
struct PartitionResult {
  float *top, *sum, *out;
};
template <typename To, typename Done>
inline void attend_partition(const AttentionStep& s, const QueryBlock& b, int64_t index,
                             const uint16_t* const* ahead, const ScoreWork& work, const To& to,
                             const Done& done) {
  Partition keys = partition_of(s, b, index);
  // The memory after the last key is uninitialised, and zero times NaN is NaN.
  const int64_t dim = s.layer.dim, end = limit_of(s, b, b.count - 1) - index * kPartition;
  if (end < kPartition && end % kBlock != 0) {
    const uint16_t* v = keys.v[keys.num_blocks - 1];
    for (int64_t t = 0; t < kBlock; ++t) {
      for (int64_t i = 0; i < dim; ++i) {
        const int64_t at = t / 2 * dim * 2 + i * 2 + t % 2;
        work.tail[at] = t < end % kBlock ? v[at] : uint16_t{0};
      }
    }
    keys.v[keys.num_blocks - 1] = work.tail;
  }
  for (int64_t row = 0; row < b.count; row += kSubRows) {
    const int64_t count = b.count - row < kSubRows ? b.count - row : kSubRows;
    if (limit_of(s, b, row + count - 1) <= index * kPartition) continue;
    const PartitionResult r = to(row);
    attend(s, b, index, keys, ahead, row, count, work, r.top, r.sum, r.out);
    done(row, count);
  }
}

// ---- Joining partitions ----------------------------------------------------------------------------

// Adds the results of partition `index` to row `row` of a block, if the row attends to it.
inline void join_partition(const AttentionStep& s, const QueryBlock& b, int64_t row, int64_t index, float top,
                           float sum, const float* values) {
  if (limit_of(s, b, row) <= index * kPartition) return;
  const int64_t dim = s.layer.dim, at = b.begin + row, cell = b.head * s.count * s.ratio + at;
  float* out = s.out + (at / s.ratio * s.layer.num_heads + b.head * s.ratio + at % s.ratio) * dim;
  if (index == 0) {
    s.top[cell] = top, s.sum[cell] = sum;
    std::memcpy(out, values, static_cast<size_t>(dim) * sizeof(float));
    return;
  }
  const float most = top > s.top[cell] ? top : s.top[cell];
  const float before = exp1(s.top[cell] - most), now = exp1(top - most);
  s.top[cell] = most;
  s.sum[cell] = std::fma(s.sum[cell], before, sum * now);
  for (int64_t i = 0; i < dim; i += W) {
    const int64_t n = dim - i < W ? dim - i : W;
    store(out + i, fma(load(out + i, n), set1(before), mul(load(values + i, n), set1(now))), n);
  }
}

// Divides by the sum and applies the gate.
inline void finish_row(const AttentionStep& s, const QueryBlock& b, int64_t row) {
  const Attention& layer = s.layer;
  const int64_t dim = layer.dim, at = b.begin + row, head = b.head * s.ratio + at % s.ratio;
  float* out = s.out + (at / s.ratio * layer.num_heads + head) * dim;
  const float* gate = s.proj + at / s.ratio * s.width + (layer.num_heads + head) * dim;
  const V scale = set1(1.0F / s.sum[b.head * s.count * s.ratio + at]);
  for (int64_t i = 0; i < dim; i += W) {
    const int64_t n = dim - i < W ? dim - i : W;
    const V value = mul(load(out + i, n), scale);
    store(out + i, layer.gate ? mul(value, sigmoid(load(gate + i, n))) : value, n);
  }
}

// ---- Work for the threads --------------------------------------------------------------------------

// One thread computes each block of queries completely. Later blocks have more keys and start first.
inline void attend_blocks(const AttentionStep& s, const QueryBlock* blocks, int64_t num_blocks) {
  parallel(num_blocks, 1, [=, &s](int64_t begin, int64_t end, int) {
    const ScoreWork work = score_work(s.layer.dim);
    for (int64_t i = begin; i < end; ++i) {
      const QueryBlock& b = blocks[num_blocks - 1 - i];
      const int64_t count = partitions(s, b);
      for (int64_t index = 0; index < count; ++index) {
        const Partition next = partition_of(s, b, index + 1 < count ? index + 1 : index);
        attend_partition(
            s, b, index, index + 1 < count ? next.k : nullptr, work,
            [&work](int64_t) { return PartitionResult{work.top, work.sum, work.out}; },
            [&](int64_t row, int64_t n) {
              for (int64_t r = 0; r < n; ++r) {
                join_partition(s, b, row + r, index, work.top[r], work.sum[r], work.out + r * s.layer.dim);
              }
            });
      }
      for (int64_t r = 0; r < b.count; ++r) finish_row(s, b, r);
    }
    release_tiles();
  });
}

struct PartitionItem {
  int64_t block, index;
  int64_t row;  // of its first result
};

// Partitions [from, to) of all blocks, one item each, to results [.., D] and their tops and sums.
inline void attend_items(const AttentionStep& s, const QueryBlock* blocks, const PartitionItem* items,
                         int64_t num_items, const PartitionResult& results) {
  const int64_t dim = s.layer.dim;
  parallel(num_items, 1 + num_items / (16 * num_threads()), [=, &s](int64_t begin, int64_t end, int) {
    const ScoreWork work = score_work(dim);
    for (int64_t i = begin; i < end; ++i) {
      const PartitionItem& item = items[i];
      const PartitionItem& after = items[i + 1 < end ? i + 1 : i];
      const Partition next = partition_of(s, blocks[after.block], after.index);
      attend_partition(
          s, blocks[item.block], item.index, i + 1 < end ? next.k : nullptr, work,
          [&](int64_t row) {
            row += item.row;
            return PartitionResult{results.top + row, results.sum + row, results.out + row * dim};
          },
          [](int64_t, int64_t) {});
    }
    release_tiles();
  });
}

// Distributes the partitions of every block over all threads, as many at a time as fit in kPartialBytes.
inline void attend_split(const AttentionStep& s, const QueryBlock* blocks, int64_t num_blocks) {
  const int64_t dim = s.layer.dim, rows = s.count * s.layer.num_heads;
  int64_t most = 0, widest = 1;
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t n = partitions(s, blocks[i]);
    most = n > most ? n : most;
    widest = blocks[i].count > widest ? blocks[i].count : widest;
  }
  const int64_t places = num_blocks * widest;  // of rows to join, some of them empty
  const int64_t fit = kPartialBytes / (rows * dim * static_cast<int64_t>(sizeof(float)));
  const int64_t span = fit < 1 ? 1 : fit < most ? fit : most;
  auto* items = take<PartitionItem>(num_blocks * span);
  auto* firsts = take<int64_t>(num_blocks);  // row of a block's first result
  const PartitionResult results = {take<float>(rows * span), take<float>(rows * span),
                                   take<float>(rows * span * dim)};
  for (int64_t from = 0; from < most; from += span) {
    int64_t num_items = 0, row = 0;
    for (int64_t i = 0; i < num_blocks; ++i) {
      const int64_t n = partitions(s, blocks[i]);
      firsts[i] = row;
      for (int64_t index = from; index < n && index < from + span; ++index, row += blocks[i].count) {
        items[num_items++] = {i, index, row};
      }
    }
    attend_items(s, blocks, items, num_items, results);
    parallel(places, 1 + places / (16 * num_threads()), [=, &s](int64_t begin, int64_t end, int) {
      for (int64_t at = begin; at < end; ++at) {
        const QueryBlock& b = blocks[at / widest];
        const int64_t r = at % widest, n = partitions(s, b);
        if (r >= b.count || n <= from) continue;
        for (int64_t index = from; index < n && index < from + span; ++index) {
          const int64_t cell = firsts[at / widest] + (index - from) * b.count + r;
          join_partition(s, b, r, index, results.top[cell], results.sum[cell], results.out + cell * dim);
        }
        if (n <= from + span) finish_row(s, b, r);
      }
    });
  }
}

inline void attend_all(const AttentionStep& s) {
  const int64_t num_blocks = query_blocks(s, nullptr);
  auto* blocks = take<QueryBlock>(num_blocks);
  query_blocks(s, blocks);
  int64_t total = 0, most = 0;
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t cost = partitions(s, blocks[i]) * blocks[i].count;
    total += cost;
    most = cost > most ? cost : most;
  }
  if (num_threads() == 1 || most * 4 * num_threads() <= total) {
    attend_blocks(s, blocks, num_blocks);
  } else {
    attend_split(s, blocks, num_blocks);
  }
}

// ---- The op ----------------------------------------------------------------------------------------

inline void attention_step(const Attention& layer, const Batch& batch, const PagedCache& cache, int64_t first,
                           int64_t count, float* x) {
  const int64_t hidden = layer.hidden, dim = layer.dim, queries = layer.num_heads * dim;
  const int64_t width = (layer.gate ? 2 : 1) * queries + 2 * layer.num_kv_heads * dim;
  const int64_t rows = count * layer.num_heads;
  AttentionStep s{layer,
                  batch,
                  cache,
                  first,
                  count,
                  layer.num_heads / layer.num_kv_heads,
                  width,
                  take<float>(count * width),
                  take<Half>(rows * dim),
                  take<float>(rows * dim),
                  take<float>(rows),
                  take<float>(rows)};
  float* mixed = take<float>(count * hidden);  // the normalised input, later the output
  {
    const Timed timed("attn.in_proj");
    parallel(count, 4, [=](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        norm_row(x + t * hidden, layer.norm, hidden, layer.eps, mixed + t * hidden);
      }
    });
    product(layer.in, quantize(mixed, count, hidden, hidden, layer.in), layer.in_bias, s.proj, width);
  }
  {
    const Timed timed("attn.scores");
    prepare_heads(s);
    attend_all(s);
  }
  const Timed timed("attn.out_proj");
  product(layer.out, quantize(s.out, count, queries, queries, layer.out), layer.out_bias, mixed, hidden);
  parallel(count, 16, [=](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * hidden; i < end * hidden; ++i) x[i] += mixed[i];
  });
}

inline void attention(const Attention& layer, const Batch& batch, const PagedCache& cache, float* x) {
  for (int64_t first = 0; first < batch.num_tokens; first += kStepTokens) {
    const int64_t left = batch.num_tokens - first;
    arena().reset();
    attention_step(layer, batch, cache, first, left < kStepTokens ? left : kStepTokens,
                   x + first * layer.hidden);
  }
}
