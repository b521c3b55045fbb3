// One pass of the gated delta rule over some columns of a state: the write of a token and the reads of keys
// and queries. Included before delta-inl.h.

constexpr int64_t kSlab = W > 8 ? 32 : 16;  // state columns of a task
constexpr int64_t kSlabVectors = kSlab / W;

inline V load_some(const float* p, int64_t n) { return n >= W ? load(p) : n > 0 ? load(p, n) : set1(0.0F); }
inline void store_some(float* p, V a, int64_t n) {
  if (n >= W) {
    store(p, a);
  } else if (n > 0) {
    store(p, a, n);
  }
}

struct Columns {
  V at[kSlabVectors];
};

inline Columns zero_columns() {
  Columns c;
  for (V& v : c.at) v = set1(0.0F);
  return c;
}
inline Columns load_columns(const float* p, int64_t width) {
  Columns c;
  for (int64_t v = 0; v < kSlabVectors; ++v) c.at[v] = load_some(p + v * W, width - v * W);
  return c;
}
inline void store_columns(float* p, const Columns& c, int64_t width) {
  for (int64_t v = 0; v < kSlabVectors; ++v) store_some(p + v * W, c.at[v], width - v * W);
}

// Sums over the rows of a slab. Even and odd rows are added separately: two chains of additions per column
// hide the adder's latency.
struct RowSums {
  Columns even = zero_columns(), odd = zero_columns();

  Columns total() const {
    Columns c;
    for (int64_t v = 0; v < kSlabVectors; ++v) c.at[v] = add(even.at[v], odd.at[v]);
    return c;
  }
};

// A place of [Dk] rows of kSlab columns.
struct Slab {
  float* data;
  int64_t stride;
};

// k^T S.
inline Columns read_slab(const Slab& s, int64_t dk, const float* k) {
  RowSums sums;
  const auto row = [&](int64_t i, Columns& sum) {
    const V key = set1(k[i]);
    for (int64_t v = 0; v < kSlabVectors; ++v)
      sum.at[v] = fma(key, load(s.data + i * s.stride + v * W), sum.at[v]);
  };
  int64_t i = 0;
  for (; i + 2 <= dk; i += 2) {
    row(i, sums.even);
    row(i + 1, sums.odd);
  }
  if (i < dk) row(i, sums.even);
  return sums.total();
}

// The write of one token to a state, and the reads after it.
struct DeltaToken {
  const float* k;     // [Dk]
  const float* q;     // [Dk]
  const float* next;  // [Dk] the next token's key
  float decay;
  Columns delta;
};

// to = decay from + k delta^T; out = q^T to where kQuery, seen = next^T to where kNext. `to` may be `from`.
template <bool kQuery, bool kNext>
inline void write_slab(const Slab& from, const Slab& to, int64_t dk, const DeltaToken& token, Columns* out,
                       Columns* seen) {
  const V decay = set1(token.decay);
  const Columns delta = token.delta;
  RowSums outs, seens;
  const auto row = [&](int64_t i, Columns& out_sum, Columns& seen_sum) {
    const V key = set1(token.k[i]);
    for (int64_t v = 0; v < kSlabVectors; ++v) {
      const V s = fma(key, delta.at[v], mul(decay, load(from.data + i * from.stride + v * W)));
      if constexpr (kQuery) out_sum.at[v] = fma(set1(token.q[i]), s, out_sum.at[v]);
      if constexpr (kNext) seen_sum.at[v] = fma(set1(token.next[i]), s, seen_sum.at[v]);
      store(to.data + i * to.stride + v * W, s);
    }
  };
  int64_t i = 0;
  for (; i + 2 <= dk; i += 2) {
    row(i, outs.even, seens.even);
    row(i + 1, outs.odd, seens.odd);
  }
  if (i < dk) row(i, outs.even, seens.even);
  if constexpr (kQuery) *out = outs.total();
  if constexpr (kNext) *seen = seens.total();
}

inline void write_slab(const Slab& from, const Slab& to, int64_t dk, const DeltaToken& token, Columns* out,
                       Columns* seen) {
  if (out == nullptr) {
    if (seen == nullptr) return write_slab<false, false>(from, to, dk, token, out, seen);
    return write_slab<false, true>(from, to, dk, token, out, seen);
  }
  if (seen == nullptr) return write_slab<true, false>(from, to, dk, token, out, seen);
  return write_slab<true, true>(from, to, dk, token, out, seen);
}
