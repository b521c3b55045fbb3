// Products of packed weights with rows of activations: loops over a target's tile product, shared by all
// targets.

// Activations in 8 bits, x / scale from -127 to 127, and their sums over groups. A scale is NaN if one of its
// values is NaN or infinite.
struct GroupCodes {        // for q8
  int8_t* q = nullptr;     // [m, groups(cols) * 32]; null where no weight needs them
  float* scale = nullptr;  // [m, groups(cols)]
  int32_t* sum = nullptr;  // [m, groups(cols)]
};
struct SpanCodes {         // for q4
  int8_t* q = nullptr;     // [m, groups(cols) * 32]; null where no weight needs them
  float* scale = nullptr;  // [m, spans(cols)]
  int16_t* sum = nullptr;  // [m, groups(cols)]
};

// Rows of activations, ready for weights of some formats. Columns beyond `cols` are zero up to groups(cols)
// * 32.
struct Rows {
  int64_t m = 0, cols = 0;
  const float* f = nullptr;  // [m, f_stride]; for bf16
  int64_t f_stride = 0;      // at least groups(cols) * 32
  GroupCodes q8;
  SpanCodes q4;
};

// The forms of rows that some weights' formats need.
struct Needs {
  bool bf16 = false, q8 = false, q4 = false;

  void add(Format format) {
    bf16 = bf16 || format == Format::bf16;
    q8 = q8 || format == Format::q8;
    q4 = q4 || format == Format::q4;
  }
};

inline GroupCodes take_groups(int64_t m, int64_t cols) {
  const int64_t n = groups(cols);
  return {take<int8_t>(m * n * kGroup), take<float>(m * n), take<int32_t>(m * n)};
}
inline SpanCodes take_spans(int64_t m, int64_t cols) {
  const int64_t n = groups(cols);
  return {take<int8_t>(m * n * kGroup), take<float>(m * spans(cols)), take<int16_t>(m * n)};
}

// From row `first` and group `group` on; for spans a multiple of 8.
inline GroupCodes skip(const GroupCodes& c, int64_t cols, int64_t first, int64_t group = 0) {
  if (c.q == nullptr) return c;
  const int64_t at = first * groups(cols) + group;
  return {c.q + at * kGroup, c.scale + at, c.sum + at};
}
inline SpanCodes skip(const SpanCodes& c, int64_t cols, int64_t first, int64_t group = 0) {
  if (c.q == nullptr) return c;
  const int64_t at = first * groups(cols) + group;
  return {c.q + at * kGroup, c.scale + first * spans(cols) + group / kSpan, c.sum + at};
}

// Defined by each target's tiles_*.h, with the same bits on all of them:

// The largest |x| of `count` groups as the bits of a float, which compare as integers; NaN is the largest.
inline int32_t top_bits(const float* x, int64_t count);

// One group: q = x * inverse rounded to nearest, ties to even; returns the sum of q.
inline int32_t round_group(const float* x, float inverse, int8_t* q);

// The first `width` columns of out [x.m, out_stride]: products of `width` rows of a matrix, in `count`
// consecutive tiles, with the rows of x. q8 computes total = fma(float(dot of a group), scale_w * scale_x,
// total) from the first group to the last, q4 the same with spans; bf16 sums even and odd columns separately,
// each from the first to the last, and then adds both. `after`: any address of the weights that this thread
// reads next, to prefetch.
inline void tile_products(Format format, const uint8_t* tiles, int64_t count, const uint8_t* after,
                          const Rows& x, float* out, int64_t out_stride, int64_t width);

// `count` groups that share a scale of max |x| / 127. If that maximum is below kLeast, all values count as
// zero, since 127 / max |x| might overflow; any NaN or infinity makes the scale NaN, and with it every
// product of the row.
constexpr float kLeast = 0x1p-120F;
template <typename Sum>
inline void round_groups(const float* x, int64_t count, int8_t* q, float* scale, Sum* sum) {
  const int32_t bits = top_bits(x, count);
  if (bits >= 0x7f800000) {
    *scale = __builtin_nanf("");
    std::memset(q, 0, static_cast<size_t>(count * kGroup));
    std::memset(sum, 0, static_cast<size_t>(count) * sizeof(Sum));
    return;
  }
  float top;
  std::memcpy(&top, &bits, sizeof(top));
  const float inverse = top >= kLeast ? 127.0F / top : 0.0F;
  *scale = top / 127.0F;
  for (int64_t g = 0; g < count; ++g) {
    sum[g] = static_cast<Sum>(round_group(x + g * kGroup, inverse, q + g * kGroup));
  }
}

// One row of groups(cols) groups, with one scale per `step` groups.
template <typename Sum>
inline void round_row(const float* x, int64_t cols, int64_t step, int8_t* q, float* scale, Sum* sum) {
  const int64_t n = groups(cols);
  for (int64_t g = 0; g < n; g += step, ++scale) {
    const int64_t count = n - g < step ? n - g : step, left = cols - g * kGroup;
    const float* from = x + g * kGroup;
    alignas(64) float rest[kSpan * kGroup];
    if (left < count * kGroup) {
      std::memset(rest, 0, sizeof(rest));
      for (int64_t i = 0; i < left; ++i) rest[i] = from[i];
      from = rest;
    }
    round_groups(from, count, q + g * kGroup, scale, sum + g);
  }
}
inline void quantize_row(const float* x, int64_t cols, const GroupCodes& to) {
  if (to.q != nullptr) round_row(x, cols, 1, to.q, to.scale, to.sum);
}
inline void quantize_row(const float* x, int64_t cols, const SpanCodes& to) {
  if (to.q != nullptr) round_row(x, cols, kSpan, to.q, to.scale, to.sum);
}

// Rows from m x cols floats at distance `stride`, allocated in the arena. If cols is a multiple of 64 the
// floats are x itself, so x must outlive the rows. Uses the pool.
inline Rows quantize(const float* x, int64_t m, int64_t cols, int64_t stride, const Needs& needs) {
  const int64_t padded = groups(cols) * kGroup;
  float* copy = padded == cols || !needs.bf16 ? nullptr : take<float>(m * padded);
  const GroupCodes q8 = needs.q8 ? take_groups(m, cols) : GroupCodes{};
  const SpanCodes q4 = needs.q4 ? take_spans(m, cols) : SpanCodes{};
  parallel(m, 1 + 16384 / (padded + 1), [=](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = x + r * stride;
      if (copy != nullptr) {
        std::memcpy(copy + r * padded, row, static_cast<size_t>(cols) * sizeof(float));
        std::memset(copy + r * padded + cols, 0, static_cast<size_t>(padded - cols) * sizeof(float));
      }
      quantize_row(row, cols, skip(q8, cols, r));
      quantize_row(row, cols, skip(q4, cols, r));
    }
  });
  return {m, cols, copy != nullptr ? copy : x, copy != nullptr ? padded : stride, q8, q4};
}

inline Rows quantize(const float* x, int64_t m, int64_t cols, int64_t stride, const Weight& w) {
  Needs needs;
  needs.add(w.format);
  return quantize(x, m, cols, stride, needs);
}

// Rows [first, first + m) of x.
inline Rows slice(const Rows& x, int64_t first, int64_t m) {
  return {m,
          x.cols,
          x.f == nullptr ? nullptr : x.f + first * x.f_stride,
          x.f_stride,
          skip(x.q8, x.cols, first),
          skip(x.q4, x.cols, first)};
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000U) << 16, body = h & 0x7fffU;
  const uint32_t bits = body >= 0x7c00U ? (body << 13) + 0x70000000U : (body << 13) + 0x38000000U;
  float normal;
  std::memcpy(&normal, &bits, sizeof(normal));
  const float value = body < 0x400U ? static_cast<float>(body) * 5.9604644775390625e-8F : normal;
  return sign != 0 ? -value : value;
}

// The integers of which q4 or q8 weights are multiples of their scale, in a tile of n groups.
inline int tile_code(Format format, const uint8_t* tile, int64_t n, int64_t g, int64_t r, int64_t c) {
  const uint8_t* group = tile + g * code_bytes(format);
  if (format == Format::q8) return group[64 * (c / 4) + 4 * r + c % 4] - 128;
  const uint8_t byte = group[64 * (c % 16 / 4) + 4 * r + c % 4];
  const uint8_t step = tile[n * code_bytes(format) + g * kTileRows + r];
  return ((c < 16 ? byte & 15 : byte >> 4) - (step >> 4)) * (step & 15);
}

// [group][row] of a q8 tile, [span][row] of a q4 tile, of n groups.
inline const uint16_t* tile_scales(Format format, const uint8_t* tile, int64_t n) {
  const int64_t bytes = code_bytes(format) + (format == Format::q4 ? kTileRows : 0);
  return reinterpret_cast<const uint16_t*>(tile + n * bytes);
}

// Rows of activations that stay in a core's L2 cache during a pass over tiles: at most about 640 KB of them.
inline int64_t rows_at_a_time(int64_t cols) {
  const int64_t rows = 655360 / (groups(cols) * (kGroup + 8)) / 16 * 16;
  return rows < 16 ? 16 : rows;
}

// Tiles that a thread takes at once: about ten microseconds of work, or a hundred with many rows, but still
// several chunks per thread.
inline int64_t tiles_at_a_time(int64_t bytes_of_tile, int64_t m, int64_t tiles) {
  const int64_t work = bytes_of_tile * (1 + m / 8);  // in bytes to be read: computing 8 rows takes as long
  const int64_t least = 1 + 32768 / work;            // less is not worth a hand-over
  const int64_t enough = 1 + 262144 / work, together = m < 64 ? 4 : 16, fair = tiles / (4 * num_threads());
  int64_t grain = (enough + together - 1) / together * together;
  grain = grain < fair ? grain : fair;
  return grain > least ? grain : least;
}

// Columns [first, first + width) of the product, `first` a multiple of 16, for all rows of x.
inline void product_columns(const Weight& w, const Rows& x, const float* bias, float* out, int64_t out_stride,
                            int64_t first, int64_t width) {
  const uint8_t* tiles = w.data + first / kTileRows * tile_bytes(w.format, w.cols);
  const int64_t count = num_tiles(width);
  tile_products(w.format, tiles, count, tiles + count * tile_bytes(w.format, w.cols), x, out + first,
                out_stride, width);
  for (int64_t i = 0; bias != nullptr && i < x.m; ++i) {
    for (int64_t r = first; r < first + width; ++r) out[i * out_stride + r] += bias[r];
  }
}

// out [x.m, out_stride], its first w.rows columns = x w^T + bias. Uses the pool.
inline void product(const Weight& w, const Rows& x, const float* bias, float* out, int64_t out_stride) {
  const int64_t tiles = num_tiles(w.rows), rows = rows_at_a_time(w.cols);
  for (int64_t from = 0; from < x.m; from += rows) {
    const Rows some = slice(x, from, x.m - from < rows ? x.m - from : rows);
    parallel(tiles, tiles_at_a_time(tile_bytes(w.format, w.cols), some.m, tiles),
             [&](int64_t begin, int64_t end, int) {
               const int64_t first = begin * kTileRows, after = end * kTileRows;
               product_columns(w, some, bias, out + from * out_stride, out_stride, first,
                               (after < w.rows ? after : w.rows) - first);
             });
  }
}

inline void linear(const float* x, int64_t m, const Weight& w, const float* bias, float* out) {
  const Timed timed("linear");
  arena().reset();
  product(w, quantize(x, m, w.cols, w.cols, w), bias, out, w.rows);
}

// Row `id` of w.
inline void embed_row(const Weight& w, int64_t id, float* out) {
  const int64_t r = id % kTileRows, n = groups(w.cols);
  const uint8_t* tile = w.data + id / kTileRows * tile_bytes(w.format, w.cols);
  const uint16_t* scales = tile_scales(w.format, tile, n);
  for (int64_t g = 0; g * kGroup < w.cols; ++g, out += kGroup) {
    const int64_t count = w.cols - g * kGroup < kGroup ? w.cols - g * kGroup : kGroup;
    if (w.format == Format::bf16) {
      const auto* group = reinterpret_cast<const uint16_t*>(tile + g * code_bytes(w.format));
      for (int64_t c = 0; c < count; ++c) out[c] = from_bf16(group[32 * (c / 2) + 2 * r + c % 2]);
    } else {
      const float scale = half_to_float(scales[(w.format == Format::q4 ? g / kSpan : g) * kTileRows + r]);
      for (int64_t c = 0; c < count; ++c) {
        out[c] = static_cast<float>(tile_code(w.format, tile, n, g, r, c)) * scale;
      }
    }
  }
}

inline void embed(const Weight& w, const int64_t* ids, int64_t m, float* out) {
  const Timed timed("embed");
  parallel(m, 1 + 16384 / (w.cols + 1), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) embed_row(w, ids[i], out + i * w.cols);
  });
}

inline void rms_norm(const float* x, const float* factor, int64_t m, int64_t n, float eps, float* out) {
  const Timed timed("rms_norm");
  parallel(m, 1 + 32768 / (n + 1), [=](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) norm_row(x + r * n, factor, n, eps, out + r * n);
  });
}

// A heap of the k best values so far, with the worst at its root.
struct Best {
  float* values;
  int64_t* ids;

  bool worse(int64_t a, int64_t b) const {
    return values[a] < values[b] || (values[a] == values[b] && ids[a] > ids[b]);
  }
  void swap(int64_t a, int64_t b) const {
    const float value = values[a];
    const int64_t id = ids[a];
    values[a] = values[b], ids[a] = ids[b];
    values[b] = value, ids[b] = id;
  }
  void sift_down(int64_t at, int64_t count) const {
    for (int64_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
      if (child + 1 < count && worse(child + 1, child)) ++child;
      if (!worse(child, at)) return;
      swap(at, child);
      at = child;
    }
  }
};

// NaN counts as minus infinity. Later values only replace the worst if they are greater, so ties go to the
// first.
inline void top_k(const float* values, int64_t n, int64_t k, float* top, int64_t* ids) {
  const Timed timed("top_k");
  if (k <= 0) return;
  const Best best{top, ids};
  for (int64_t i = 0; i < k; ++i) {
    top[i] = values[i] == values[i] ? values[i] : -HUGE_VALF;
    ids[i] = i;
  }
  for (int64_t i = k / 2 - 1; i >= 0; --i) best.sift_down(i, k);
  const auto offer = [&](int64_t i) {
    if (!(values[i] > top[0])) return;
    top[0] = values[i], ids[0] = i;
    best.sift_down(0, k);
  };
  int64_t i = k;
  for (; i + 4 * W <= n; i += 4 * W) {
    const V worst = set1(top[0]);
    const V a = load(values + i), b = load(values + i + W), c = load(values + i + 2 * W);
    if (!any_greater(a, worst) && !any_greater(b, worst) && !any_greater(c, worst) &&
        !any_greater(load(values + i + 3 * W), worst)) {
      continue;
    }
    for (int64_t j = i; j < i + 4 * W; ++j) offer(j);
  }
  for (; i < n; ++i) offer(i);
  for (int64_t count = k - 1; count > 0; --count) {
    best.swap(0, count);
    best.sift_down(0, count);
  }
}
