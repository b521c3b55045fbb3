// Feed-forward parts: router, experts, shared expert, dense. Included after the products.
//
// Every expert that has tokens is a part; the shared expert (or the one MLP of a dense layer) is the last.
// There are two passes over all parts: gate and up to the rounded hidden rows, then down, where one thread
// per range of output columns adds the parts in ascending order. So a token's result does not depend on the
// other tokens or on the threads, and no two threads write the same address.

constexpr int64_t kUnit = 2 * kGroup;  // hidden columns made together: whole groups, an even number of them
constexpr int64_t kWideUnit = kSpan * kGroup;  // or a whole span
constexpr int64_t kMaxTokens = 4096;           // of one round; more tokens take several
constexpr int64_t kRowBytes =
    512 * 1024;                     // codes of the rows that a tile meets at a time: they stay in cache
constexpr int64_t kWeightCost = 8;  // reading a weight takes as long as computing with this many rows
constexpr int64_t kFewRows = 4;     // of a part, at which reading its weights takes all the time

// Rows that can be written.
struct RowBuffer {
  int64_t cols = 0;
  float* f = nullptr;  // null where nobody needs floats
  GroupCodes q8;
  SpanCodes q4;
};

inline RowBuffer take_rows(int64_t m, int64_t cols, const Needs& needs) {
  return {cols, needs.bf16 ? take<float>(m * groups(cols) * kGroup) : nullptr,
          needs.q8 ? take_groups(m, cols) : GroupCodes{}, needs.q4 ? take_spans(m, cols) : SpanCodes{}};
}

// The buffer from row `first` on.
inline RowBuffer skip(const RowBuffer& b, int64_t first) {
  return {b.cols, b.f == nullptr ? nullptr : b.f + first * groups(b.cols) * kGroup, skip(b.q8, b.cols, first),
          skip(b.q4, b.cols, first)};
}

inline Rows rows_of(const RowBuffer& b, int64_t first, int64_t m) {
  const RowBuffer from = skip(b, first);
  return {m, b.cols, from.f, groups(b.cols) * kGroup, from.q8, from.q4};
}

// Rows to compute together: few enough that their codes stay in cache, enough to amortise unpacking the
// weights.
inline int64_t row_block(int64_t cols) {
  const int64_t fit = kRowBytes / (groups(cols) * kGroup) / 16 * 16;
  return fit < 32 ? 32 : fit > 256 ? 256 : fit;
}

// The work of one expert.
struct Part {
  const uint8_t *w13 = nullptr, *w2 = nullptr;
  Format format13 = Format::q4, format2 = Format::q4;
  const float *bias13 = nullptr, *bias2 = nullptr;
  int64_t width = 0;  // hidden columns
  int64_t num_rows = 0;
  const int32_t* tokens = nullptr;  // [num_rows] ascending
  const float* weights = nullptr;   // [num_rows] factors of the results
  RowBuffer hidden;                 // [num_rows, width]
  int64_t unit = kUnit;             // hidden columns made together

  // Whether hidden rows are stored as floats and rounded at the end, because a unit is less than a span.
  bool rounded_later() const { return format2 == Format::q4 && unit < kWideUnit; }
};

struct Ranges {  // of one item of the first pass: units and rows of a part
  int32_t part, unit, end_unit, row, end_row;
};

// ---- Router ----------------------------------------------------------------------------------------

inline float max_of_group(const float* p) {
  V top = load(p);
  for (int64_t i = W; i < kGroup; i += W) top = max(top, load(p + i));
  return reduce_max(top);
}

// Softmax over n logits, then the k largest probabilities; among equals, the lower index comes first. If a
// logit is NaN or +inf, the weights are NaN. `work` holds n floats, rounded up to whole groups, and one more
// per group.
inline void topk_softmax(const float* logits, int64_t n, int64_t k, bool renormalize, float* work,
                         float* weights, int32_t* ids) {
  const int64_t num_groups = (n + kGroup - 1) / kGroup, padded = num_groups * kGroup;
  float* tops = work + padded;
  std::memcpy(work, logits, static_cast<size_t>(n) * sizeof(float));
  for (int64_t i = n; i < padded; ++i) work[i] = -3e38F;
  V top = load(work);
  for (int64_t i = W; i < padded; i += W) top = max(top, load(work + i));
  const V highest = set1(reduce_max(top));
  V total = set1(0.0F);
  for (int64_t i = 0; i < padded; i += W) {
    const V e = exp(sub(load(work + i), highest));
    store(work + i, e);
    total = add(total, e);  // the padding adds less than a rounding
  }
  const float sum = reduce_add(total);
  for (int64_t i = n; i < padded; ++i) work[i] = -1.0F;
  for (int64_t g = 0; g < num_groups; ++g) tops[g] = max_of_group(work + g * kGroup);
  float chosen = 0;
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = 0;
    for (int64_t g = 1; g < num_groups; ++g) best = tops[g] > tops[best] ? g : best;
    int64_t i = best * kGroup;
    while (i + 1 < n && work[i] != tops[best]) ++i;
    ids[j] = sum == sum ? static_cast<int32_t>(i) : static_cast<int32_t>(j);
    weights[j] = sum == sum ? work[i] / sum : sum;
    chosen += weights[j];
    work[i] = -1.0F;
    tops[best] = max_of_group(work + best * kGroup);
  }
  for (int64_t j = 0; j < k && renormalize; ++j) weights[j] /= chosen;
}

struct Routing {    // the (token, slot) pairs in ascending order of experts, then of tokens
  int64_t* starts;  // [E + 1] first pair of each expert
  int32_t* tokens;  // [pairs]
  float* weights;   // [pairs]
};

inline Routing route(const Ffn& layer, int64_t num_tokens, const float* logits) {
  const int64_t e = layer.num_experts, k = layer.top_k, num_pairs = num_tokens * k;
  const int64_t size = (e + kGroup - 1) / kGroup * (kGroup + 1);
  float* work = take<float>(size * num_threads());
  float* weights = take<float>(num_pairs);
  int32_t* ids = take<int32_t>(num_pairs);
  parallel(num_tokens, 8, [=, &layer](int64_t begin, int64_t end, int thread) {
    for (int64_t t = begin; t < end; ++t) {
      topk_softmax(logits + t * e, e, k, layer.renormalize, work + thread * size, weights + t * k,
                   ids + t * k);
    }
  });
  const Routing routing{take<int64_t>(e + 1), take<int32_t>(num_pairs), take<float>(num_pairs)};
  std::memset(routing.starts, 0, static_cast<size_t>(e + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < num_pairs; ++i) ++routing.starts[ids[i]];
  for (int64_t i = 0, first = 0; i <= e; ++i) {
    const int64_t count = routing.starts[i];
    routing.starts[i] = first;
    first += count;
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t place = routing.starts[ids[i]]++;
    routing.tokens[place] = static_cast<int32_t>(i / k);
    routing.weights[place] = weights[i];
  }
  for (int64_t i = e; i > 0; --i) routing.starts[i] = routing.starts[i - 1];
  routing.starts[0] = 0;
  return routing;
}

// ---- Parts -----------------------------------------------------------------------------------------

struct Parts {
  Part* parts;
  int64_t count;
};

inline int64_t add_experts(const Ffn& layer, const Routing& routing, Part* parts) {
  int64_t count = 0;
  Needs needs;
  needs.add(layer.format2);
  const RowBuffer hidden = take_rows(routing.starts[layer.num_experts], layer.intermediate, needs);
  for (int64_t e = 0; e < layer.num_experts; ++e) {
    const int64_t first = routing.starts[e], num_rows = routing.starts[e + 1] - first;
    if (num_rows == 0) continue;
    const uint8_t* w13 = layer.experts[e];
    parts[count++] = {w13,
                      w13 + layer.offset2,
                      layer.format13,
                      layer.format2,
                      nullptr,
                      nullptr,
                      layer.intermediate,
                      num_rows,
                      routing.tokens + first,
                      routing.weights + first,
                      skip(hidden, first)};
  }
  return count;
}

// The shared expert gets every token, with the weights `gates` [T].
inline Part shared_part(const Mlp& mlp, int64_t num_tokens, const float* gates) {
  int32_t* tokens = take<int32_t>(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) tokens[t] = static_cast<int32_t>(t);
  const int64_t width = mlp.w13.rows / 2;
  Needs needs;
  needs.add(mlp.w2.format);
  return {mlp.w13.data,
          mlp.w2.data,
          mlp.w13.format,
          mlp.w2.format,
          mlp.bias13,
          mlp.bias2,
          width,
          num_tokens,
          tokens,
          gates,
          take_rows(num_tokens, width, needs)};
}

// Whole spans at a time if that leaves enough work for all threads.
inline void choose_units(const Parts& all) {
  int64_t wide = 0;
  for (int64_t p = 0; p < all.count; ++p) wide += (all.parts[p].width + kWideUnit - 1) / kWideUnit;
  for (int64_t p = 0; p < all.count; ++p) {
    Part& part = all.parts[p];
    if (part.format2 != Format::q4) continue;
    if (wide >= 8 * num_threads()) part.unit = kWideUnit;
    if (part.rounded_later()) part.hidden.f = take<float>(part.num_rows * groups(part.width) * kGroup);
  }
}

// ---- Gate and up -----------------------------------------------------------------------------------

// Calls f(Ranges) for the items of the first pass: about 32 per thread, or 12 with few rows, since reading
// weights is fastest in long pieces. Parts with many rows come first, and items are whole parts if there are
// enough of them, since the rows of an item are gathered only once.
template <typename F>
inline void for_each_item(const Parts& all, const F& f) {
  int64_t total = 0, most = 0;
  for (int64_t p = 0; p < all.count; ++p) {
    const Part& part = all.parts[p];
    total += (part.num_rows + kWeightCost) * ((part.width + part.unit - 1) / part.unit) * part.unit;
    most = part.num_rows > most ? part.num_rows : most;
  }
  const int64_t share = total / ((most <= kFewRows ? 12 : 32) * num_threads()) + 1;
  for (int64_t high = most; high > 0; high /= 2) {
    for (int64_t p = 0; p < all.count; ++p) {
      const Part& part = all.parts[p];
      if (part.num_rows > high || part.num_rows <= high / 2) continue;
      const int64_t num_units = (part.width + part.unit - 1) / part.unit;
      const int64_t units = share / ((part.num_rows + kWeightCost) * part.unit) + 1;
      const int64_t rows = share < 64 * kUnit ? 64 : share / kUnit;
      for (int64_t u = 0; u < num_units; u += units) {
        for (int64_t r = 0; r < part.num_rows; r += rows) {
          const int64_t end_u = u + units < num_units ? u + units : num_units;
          const int64_t end_r = r + rows < part.num_rows ? r + rows : part.num_rows;
          f(Ranges{static_cast<int32_t>(p), static_cast<int32_t>(u), static_cast<int32_t>(end_u),
                   static_cast<int32_t>(r), static_cast<int32_t>(end_r)});
        }
      }
    }
  }
}

// Gathers rows `tokens` [m] of x for weights of one format, or returns x itself if they are contiguous.
inline Rows gather(const RowBuffer& x, const int32_t* tokens, int64_t m, Format format, const RowBuffer& to) {
  if (tokens[m - 1] - tokens[0] == m - 1) return rows_of(x, tokens[0], m);
  const int64_t n = groups(x.cols);
  const auto codes = static_cast<size_t>(n * kGroup), num = static_cast<size_t>(n);
  for (int64_t i = 0; i < m; ++i) {
    const RowBuffer from = skip(x, tokens[i]), row = skip(to, i);
    if (format == Format::bf16) {
      std::memcpy(row.f, from.f, codes * sizeof(float));
    } else if (format == Format::q8) {
      std::memcpy(row.q8.q, from.q8.q, codes);
      std::memcpy(row.q8.scale, from.q8.scale, num * sizeof(float));
      std::memcpy(row.q8.sum, from.q8.sum, num * sizeof(int32_t));
    } else {
      std::memcpy(row.q4.q, from.q4.q, codes);
      std::memcpy(row.q4.scale, from.q4.scale, static_cast<size_t>(spans(x.cols)) * sizeof(float));
      std::memcpy(row.q4.sum, from.q4.sum, num * sizeof(int16_t));
    }
  }
  return rows_of(to, 0, m);
}

// Floats per row of a unit's buffer: gate, then up, whose rows may start inside a tile.
inline int64_t unit_stride(int64_t unit) { return 2 * unit + kTileRows; }

// The start of a unit's gate; the weights have `cols` inputs.
inline const uint8_t* first_tile(const Part& part, int64_t unit, int64_t cols) {
  return part.w13 + unit * part.unit / kTileRows * tile_bytes(part.format13, cols);
}

// Hidden columns of one unit: silu(gate x) * (up x), into `hidden` as rows. `work` is [x.m, unit_stride].
// `after`: what this thread reads next.
inline void gate_up(const Part& part, int64_t unit, const uint8_t* after, const Rows& x, float* work,
                    const RowBuffer& hidden) {
  const int64_t first = unit * part.unit, stride = unit_stride(part.unit);
  const int64_t width = part.width - first < part.unit ? part.width - first : part.unit;
  const int64_t bytes = tile_bytes(part.format13, x.cols), first_up = part.width + first;
  const int64_t gate_tile = first / kTileRows, up_tile = first_up / kTileRows;
  const int64_t num_gate = num_tiles(width), num_up = num_tiles(first_up + width) - up_tile;
  tile_products(part.format13, part.w13 + gate_tile * bytes, num_gate, part.w13 + up_tile * bytes, x, work,
                stride, num_gate * kTileRows);
  tile_products(part.format13, part.w13 + up_tile * bytes, num_up, after, x, work + part.unit, stride,
                num_up * kTileRows);
  const int64_t n = groups(part.width);
  for (int64_t i = 0; i < x.m; ++i) {
    float* gate = work + i * stride;
    float* up = gate + part.unit + first_up % kTileRows;
    for (int64_t c = 0; part.bias13 != nullptr && c < width; ++c) {
      gate[c] += part.bias13[first + c];
      up[c] += part.bias13[first_up + c];
    }
    for (int64_t c = 0; c < width; c += W) store(gate + c, mul(silu(load(gate + c)), load(up + c)));
    if (part.format2 == Format::q8) {
      quantize_row(gate, width, skip(hidden.q8, part.width, i, first / kGroup));
    } else if (part.format2 == Format::q4 && !part.rounded_later()) {
      quantize_row(gate, width, skip(hidden.q4, part.width, i, first / kGroup));
    } else {
      float* f = hidden.f + i * n * kGroup + first;
      std::memcpy(f, gate, static_cast<size_t>(width) * sizeof(float));
      std::memset(f + width, 0, static_cast<size_t>(groups(width) * kGroup - width) * sizeof(float));
    }
  }
}

// Rounds the hidden rows that are still floats.
inline void round_hidden(const Parts& all) {
  for (int64_t p = 0; p < all.count; ++p) {
    const Part& part = all.parts[p];
    if (!part.rounded_later()) continue;
    parallel(part.num_rows, 1 + 65536 / part.width, [&part](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const RowBuffer row = skip(part.hidden, i);
        quantize_row(row.f, part.width, row.q4);
      }
    });
  }
}

inline void gate_up(const Parts& all, const RowBuffer& x) {
  const Timed timed("ffn.gate_up");
  int64_t count = 0, most = 0, unit = kUnit;
  Needs needs;
  for_each_item(all, [&](const Ranges&) { ++count; });
  Ranges* items = take<Ranges>(count);
  count = 0;
  for_each_item(all, [&](const Ranges& item) { items[count++] = item; });
  for (int64_t p = 0; p < all.count; ++p) {
    most = all.parts[p].num_rows > most ? all.parts[p].num_rows : most;
    unit = all.parts[p].unit > unit ? all.parts[p].unit : unit;
    needs.add(all.parts[p].format13);
  }
  const int64_t block = row_block(x.cols) < most ? row_block(x.cols) : most;
  const RowBuffer gathered = take_rows(block * num_threads(), x.cols, needs);
  const int64_t size = block * unit_stride(unit);
  float* work = take<float>(num_threads() * size);
  parallel(count, 1, [=, &all](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const Ranges& item = items[i];
      const Part& part = all.parts[item.part];
      const Ranges& likely = items[i + num_threads() < count ? i + num_threads() : i];
      const uint8_t* next = first_tile(all.parts[likely.part], likely.unit, x.cols);
      for (int64_t r = item.row; r < item.end_row; r += block) {
        const int64_t m = item.end_row - r < block ? item.end_row - r : block;
        const Rows rows = gather(x, part.tokens + r, m, part.format13, skip(gathered, thread * block));
        for (int64_t u = item.unit; u < item.end_unit; ++u) {
          const uint8_t* after = u + 1 < item.end_unit ? first_tile(part, u + 1, x.cols) : next;
          gate_up(part, u, after, rows, work + thread * size, skip(part.hidden, r));
        }
      }
    }
  });
  round_hidden(all);
}

// ---- Down ------------------------------------------------------------------------------------------

// sums [T, stride] += weights * (hidden rows w2^T + bias2) of one part for tiles [begin, end) of the output.
inline void add_part(const Part& part, const uint8_t* after, int64_t begin, int64_t end, int64_t hidden,
                     float* y, float* sums, int64_t stride) {
  const int64_t bytes = tile_bytes(part.format2, part.width), block = row_block(part.width);
  for (int64_t r = 0; r < part.num_rows; r += block) {
    const Rows rows = rows_of(part.hidden, r, part.num_rows - r < block ? part.num_rows - r : block);
    tile_products(part.format2, part.w2 + begin * bytes, end - begin, after, rows, y, stride,
                  (end - begin) * kTileRows);
    for (int64_t i = 0; i < rows.m; ++i) {
      float* out = sums + part.tokens[r + i] * stride;
      float* row = y + i * stride;
      for (int64_t c = begin * kTileRows; part.bias2 != nullptr && c < end * kTileRows && c < hidden; ++c) {
        row[c - begin * kTileRows] += part.bias2[c];
      }
      const V weight = set1(part.weights[r + i]);
      for (int64_t c = 0; c < (end - begin) * kTileRows; c += W) {
        store(out + c, fma(weight, load(row + c), load(out + c)));
      }
    }
  }
}

// x [T, hidden] += the sum of all parts, in their order.
inline void down(const Parts& all, int64_t num_tokens, int64_t hidden, float* x) {
  const Timed timed("ffn.down");
  int64_t block = 0;
  for (int64_t p = 0; p < all.count; ++p) {
    const Part& part = all.parts[p];
    const int64_t rows = part.num_rows < row_block(part.width) ? part.num_rows : row_block(part.width);
    block = rows > block ? rows : block;
  }
  // Reading weights is fastest in long pieces; with many tokens, shorter ones are better, so that the sums
  // stay in cache.
  const int64_t items = 2 * num_threads(), tiles = num_tiles(hidden), most = num_tokens <= 16 ? 64 : 32;
  const int64_t grain = tiles < items ? 1 : tiles / items > most ? most : tiles / items;
  const int64_t stride = grain * kTileRows;
  float* work = take<float>(num_threads() * (block + num_tokens) * stride);
  parallel(tiles, grain, [=, &all](int64_t begin, int64_t end, int thread) {
    float* y = work + thread * (block + num_tokens) * stride;
    float* sums = y + block * stride;
    std::memset(sums, 0, static_cast<size_t>(num_tokens * stride) * sizeof(float));
    for (int64_t p = 0; p < all.count; ++p) {
      const Part& next = all.parts[p + 1 < all.count ? p + 1 : p];
      const uint8_t* after = next.w2 + begin * tile_bytes(next.format2, next.width);
      add_part(all.parts[p], after, begin, end, hidden, y, sums, stride);
    }
    const int64_t first = begin * kTileRows,
                  width = (end * kTileRows < hidden ? end * kTileRows : hidden) - first;
    for (int64_t t = 0; t < num_tokens; ++t) {
      float* out = x + t * hidden + first;
      const float* sum = sums + t * stride;
      int64_t c = 0;
      for (; c + W <= width; c += W) store(out + c, add(load(out + c), load(sum + c)));
      if (c < width) store(out + c, add(load(out + c, width - c), load(sum + c, width - c)), width - c);
    }
  });
}

// ---- The layer -------------------------------------------------------------------------------------

// Normed rows of x, ready for products, and the shared expert's gate of each.
inline void norm_rows(const Ffn& layer, int64_t num_tokens, const float* x, const RowBuffer& rows,
                      float* gates) {
  const int64_t h = layer.hidden, n = groups(h);
  parallel(num_tokens, 4, [=, &layer](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const RowBuffer row = skip(rows, t);
      norm_row(x + t * h, layer.norm, h, layer.eps, row.f);
      std::memset(row.f + h, 0, static_cast<size_t>(n * kGroup - h) * sizeof(float));
      quantize_row(row.f, h, row.q8);
      quantize_row(row.f, h, row.q4);
      alignas(64) float gate[W] = {1.0F};
      if (layer.shared_gate != nullptr) store(gate, sigmoid(set1(dot(row.f, layer.shared_gate, h))));
      gates[t] = gate[0];
    }
  });
}

inline void ffn_round(const Ffn& layer, int64_t num_tokens, float* x, float* router_logits) {
  arena().reset();
  Needs needs;
  needs.bf16 = true;  // what is not rounded takes the gate of the shared expert
  if (layer.router.data != nullptr) {
    needs.add(layer.router.format);
    needs.add(layer.format13);
  }
  if (layer.shared.w13.data != nullptr) needs.add(layer.shared.w13.format);
  const RowBuffer rows = take_rows(num_tokens, layer.hidden, needs);
  Parts all{take<Part>(layer.num_experts + 1), 0};
  float* gates = take<float>(num_tokens);
  {
    const Timed timed("ffn.router");
    norm_rows(layer, num_tokens, x, rows, gates);
    if (layer.router.data != nullptr) {
      float* logits = router_logits != nullptr ? router_logits : take<float>(num_tokens * layer.num_experts);
      product(layer.router, rows_of(rows, 0, num_tokens), nullptr, logits, layer.num_experts);
      all.count = add_experts(layer, route(layer, num_tokens, logits), all.parts);
    }
    if (layer.shared.w13.data != nullptr)
      all.parts[all.count++] = shared_part(layer.shared, num_tokens, gates);
  }
  choose_units(all);
  gate_up(all, rows);
  down(all, num_tokens, layer.hidden, x);
}

inline void ffn(const Ffn& layer, int64_t num_tokens, float* x, float* router_logits) {
  for (int64_t t = 0; t < num_tokens; t += kMaxTokens) {
    float* logits = router_logits != nullptr ? router_logits + t * layer.num_experts : nullptr;
    ffn_round(layer, num_tokens - t < kMaxTokens ? num_tokens - t : kMaxTokens, x + t * layer.hidden, logits);
  }
}
