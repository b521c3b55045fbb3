// Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024): projections, convolution, gates, delta rule, gated norm.
//
// The recurrence runs token by token in prefill as in decode, so that splitting a sequence into steps does
// not change the bits. A task owns some columns of one head's state: columns are independent, those of a task
// fit in the L1 cache, and one pass over them per token suffices, since the pass that writes a token also
// reads the state for the next token's key.

constexpr int64_t kDeltaTokens = 512;  // tokens computed together: bounds the scratch memory
constexpr int64_t kConvTokens = 16;    // tokens of a task of the convolution
constexpr float kL2Eps = 1e-6F;

// Tokens [begin, end) of the block, all of one sequence. Only a sequence's last piece has tentative tokens,
// and only its first has journaled tokens.
struct Piece {
  int64_t row, begin, end, tentative, pending;
};

// The start of the next block: a token on the packed axis and its sequence.
struct DeltaCursor {
  int64_t seq = 0, token = 0;
};

// The tokens computed together, and intermediate results. A unit is a head of the convolution: query heads,
// key heads, then value heads.
struct DeltaBlock {
  const GatedDeltaNet& layer;
  const RecurrentCache& cache;
  int64_t n = 0, num_pieces = 0;
  Piece* pieces = nullptr;
  float* mixed = nullptr;  // [n, stride] query | key | value | z before the convolution
  float* ba = nullptr;     // [n, 2 V] b | a
  // [n, width] of one unit after the other; queries and keys normalised, values replaced by the outputs.
  float* heads = nullptr;
  float* log_decay = nullptr;  // [V, n], as are decay and beta
  float* decay = nullptr;
  float* beta = nullptr;
  int64_t stride = 0;

  int64_t key_channels() const { return layer.num_k_heads * layer.dk; }
  int64_t value_channels() const { return layer.num_v_heads * layer.dv; }
  int64_t channels() const { return 2 * key_channels() + value_channels(); }
  int64_t num_units() const { return 2 * layer.num_k_heads + layer.num_v_heads; }
  int64_t unit_width(int64_t unit) const { return unit < 2 * layer.num_k_heads ? layer.dk : layer.dv; }
  int64_t unit_channel(int64_t unit) const {
    const int64_t keys = 2 * layer.num_k_heads;
    return unit < keys ? unit * layer.dk : keys * layer.dk + (unit - keys) * layer.dv;
  }
  float* unit(int64_t unit) const { return heads + n * unit_channel(unit); }
  float* values(int64_t head) const { return unit(2 * layer.num_k_heads + head); }
};

inline void copy_floats(float* to, const float* from, int64_t n) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
}

// ---- Convolution and gates -------------------------------------------------------------------------

// out [width] = silu of the sum over taps j of past[j] [width] times taps[j] [width], oldest first.
template <int64_t kTaps>
inline void conv_row(const float* const* past, const float* taps, int64_t width, int64_t kernel, float* out) {
  const int64_t count = kTaps > 0 ? kTaps : kernel;
  for (int64_t c = 0; c < width; c += W) {
    const int64_t left = width - c;
    V sum = mul(load_some(past[0] + c, left), load_some(taps + c, left));
    for (int64_t j = 1; j < count; ++j) {
      sum = fma(load_some(past[j] + c, left), load_some(taps + j * width + c, left), sum);
    }
    store_some(out + c, silu(sum), left);
  }
}

// taps [kTaps, width] from weight [width, kTaps].
template <int64_t kTaps>
inline void transpose_taps(const float* weight, int64_t width, int64_t kernel, float* taps) {
  const int64_t count = kTaps > 0 ? kTaps : kernel;
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t j = 0; j < count; ++j) taps[j * width + c] = weight[c * count + j];
  }
}

// x [width] = x / sqrt(sum x^2 + eps) * factor.
inline void l2_normalize(float* x, int64_t width, float factor) {
  const V scale = set1(factor / std::sqrt(dot(x, x, width) + kL2Eps));
  for (int64_t c = 0; c < width; c += W) {
    store_some(x + c, mul(load_some(x + c, width - c), scale), width - c);
  }
}

// Raw inputs of one unit around a piece: the window of the cache, then the piece's own tokens.
struct ConvInput {
  float* window;        // [window_rows, channels], at the unit's first channel
  const float* tokens;  // [piece, stride], the same
  int64_t window_rows, channels, stride;

  const float* row(int64_t token) const {
    return token < 0 ? window + (window_rows + token) * channels : tokens + token * stride;
  }
};

inline ConvInput conv_input(const DeltaBlock& b, const Piece& piece, int64_t unit) {
  const int64_t rows = b.cache.history + b.cache.max_rollback, channel = b.unit_channel(unit);
  return {b.cache.conv + piece.row * rows * b.channels() + channel,
          b.mixed + piece.begin * b.stride + channel, rows, b.channels(), b.stride};
}

// Tokens [begin, end) of a piece for one unit.
template <int64_t kTaps>
inline void conv_unit(const DeltaBlock& b, const Piece& piece, int64_t unit, int64_t begin, int64_t end) {
  const GatedDeltaNet& layer = b.layer;
  const int64_t kernel = layer.kernel, width = b.unit_width(unit);
  const ConvInput input = conv_input(b, piece, unit);
  const auto taps_bytes = static_cast<size_t>(kernel * width) * sizeof(float);
  auto* past =
      static_cast<const float**>(thread_scratch(static_cast<size_t>(kernel) * sizeof(float*) + taps_bytes));
  auto* taps = reinterpret_cast<float*>(past + kernel);
  transpose_taps<kTaps>(layer.conv + b.unit_channel(unit) * kernel, width, kernel, taps);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t j = 0; j < kernel; ++j) past[j] = input.row(t - kernel + 1 + j);
    float* out = b.unit(unit) + (piece.begin + t) * width;
    conv_row<kTaps>(past, taps, width, kernel, out);
    if (unit < layer.num_k_heads) {
      l2_normalize(out, width, 1.0F / std::sqrt(static_cast<float>(layer.dk)));
    } else if (unit < 2 * layer.num_k_heads) {
      l2_normalize(out, width, 1.0F);
    }
  }
}

// Advances the unit's channels of the window to the piece's last token, in place, which is safe since sources
// come later. Rows before those that a rollback may need are left unchanged.
inline void advance_window(const DeltaBlock& b, const Piece& piece, int64_t unit) {
  const ConvInput input = conv_input(b, piece, unit);
  const int64_t length = piece.end - piece.begin;
  for (int64_t j = input.window_rows - b.cache.history - piece.tentative; j < input.window_rows; ++j) {
    copy_floats(input.window + j * input.channels, input.row(j + length - input.window_rows),
                b.unit_width(unit));
  }
}

inline void gate_tokens(const DeltaBlock& b, int64_t head, int64_t begin, int64_t end) {
  const int64_t heads = b.layer.num_v_heads;
  for (int64_t t = begin; t < end; ++t) {
    const float* ba = b.ba + t * 2 * heads;
    const float a = ba[heads + head] + b.layer.dt_bias[head];
    const float softplus = a > 20.0F ? a : std::log1p(exp1(a));  // above 20 they are the same float
    const int64_t at = head * b.n + t;
    b.log_decay[at] = b.layer.decay[head] * softplus;
    b.decay[at] = exp1(b.log_decay[at]);
    b.beta[at] = 1.0F / (1.0F + exp1(-ba[head]));
  }
}

struct ConvTile {
  int64_t piece, begin, end;
};

inline void conv_tile(const DeltaBlock& b, const ConvTile& tile, int64_t unit) {
  const Piece& piece = b.pieces[tile.piece];
  switch (b.layer.kernel) {
    case 2:
      conv_unit<2>(b, piece, unit, tile.begin, tile.end);
      break;
    case 3:
      conv_unit<3>(b, piece, unit, tile.begin, tile.end);
      break;
    case 4:
      conv_unit<4>(b, piece, unit, tile.begin, tile.end);
      break;
    default:
      conv_unit<0>(b, piece, unit, tile.begin, tile.end);
  }
  if (tile.begin == 0) advance_window(b, piece, unit);
  const int64_t head = unit - 2 * b.layer.num_k_heads;
  if (head >= 0) gate_tokens(b, head, piece.begin + tile.begin, piece.begin + tile.end);
}

inline void delta_conv(const DeltaBlock& b) {
  const Timed timed("gdn.conv");
  // Only the first tile may read the window, which it then advances.
  const int64_t step = b.layer.kernel > kConvTokens ? b.layer.kernel : kConvTokens;
  auto* tiles = take<ConvTile>(b.n / step + b.num_pieces);
  int64_t count = 0;
  for (int64_t p = 0; p < b.num_pieces; ++p) {
    const int64_t length = b.pieces[p].end - b.pieces[p].begin;
    for (int64_t t = 0; t < length; t += step) {
      tiles[count++] = {p, t, t + step < length ? t + step : length};
    }
  }
  parallel(count * b.num_units(), b.n > 4 * count ? 2 : 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) conv_tile(b, tiles[i / b.num_units()], i % b.num_units());
  });
}

// ---- The delta rule --------------------------------------------------------------------------------

// One task: columns [column, column + width) of one head's state over a piece. The state is read from and
// written to the cache only once: each token's pass reads what the previous pass wrote to scratch, and the
// pass of the last token to keep writes to the cache.
struct DeltaTask {
  const DeltaBlock& b;
  const Piece& piece;
  int64_t head, column, width;
  Slab home, scratch, now;
  int64_t left;  // writes until the state is the one to keep

  DeltaTask(const DeltaBlock& block, const Piece& p, int64_t h, int64_t slab)
      : b(block), piece(p), head(h), column(slab * kSlab) {
    const int64_t dk = b.layer.dk, dv = b.layer.dv;
    width = dv - column < kSlab ? dv - column : kSlab;
    home = {b.cache.state + (piece.row * b.layer.num_v_heads + head) * dk * dv + column, dv};
    scratch = {static_cast<float*>(thread_scratch(static_cast<size_t>(dk * kSlab) * sizeof(float))), kSlab};
    left = piece.pending + piece.end - piece.begin - piece.tentative;
    now = home;
    if (width == kSlab) return;
    now = scratch;  // a slab at the right edge has room for whole vectors only there
    for (int64_t i = 0; i < dk; ++i) {
      store_columns(scratch.data + i * kSlab, load_columns(home.data + i * dv, width), kSlab);
    }
  }

  void write(const DeltaToken& token, Columns* out, Columns* seen) {
    const bool keep = --left == 0;
    const Slab to = keep && width == kSlab ? home : scratch;
    write_slab(now, to, b.layer.dk, token, out, seen);
    now = to;
    if (!keep || width == kSlab) return;
    for (int64_t i = 0; i < b.layer.dk; ++i)
      copy_floats(home.data + i * home.stride, to.data + i * kSlab, width);
  }

  int64_t journal(int64_t token) const {  // index of this head's entry
    return (piece.row * b.cache.max_rollback + token) * b.layer.num_v_heads + head;
  }
  float* journal_delta(int64_t token) const {
    return b.cache.journal_delta + journal(token) * b.layer.dv + column;
  }

  // Applies the valid tokens of the journal; returns the state read by the first key after them.
  void replay(const float* first, Columns* seen) {
    for (int64_t j = 0; j < piece.pending; ++j) {
      const DeltaToken token = {b.cache.journal_k + journal(j) * b.layer.dk, nullptr, first,
                                exp1(b.cache.journal_g[journal(j)]), load_columns(journal_delta(j), width)};
      write(token, nullptr, first != nullptr && j + 1 == piece.pending ? seen : nullptr);
    }
    if (first != nullptr && piece.pending == 0) *seen = read_slab(now, b.layer.dk, first);
  }

  Columns delta(int64_t t, const float* value, const Columns& seen) const {
    const V decay = set1(b.decay[head * b.n + t]), beta = set1(b.beta[head * b.n + t]);
    Columns delta = load_columns(value, width);
    for (int64_t v = 0; v < kSlabVectors; ++v)
      delta.at[v] = mul(beta, sub(delta.at[v], mul(decay, seen.at[v])));
    return delta;
  }

  void run() {
    const int64_t dk = b.layer.dk, key_head = head / (b.layer.num_v_heads / b.layer.num_k_heads);
    const float* q = b.unit(key_head);
    const float* k = b.unit(b.layer.num_k_heads + key_head);
    float* values = b.values(head) + column;
    Columns seen, out;
    replay(piece.begin < piece.end ? k + piece.begin * dk : nullptr, &seen);
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      float* value = values + t * b.layer.dv;
      const float* next = t + 1 < piece.end ? k + (t + 1) * dk : nullptr;
      const DeltaToken token = {k + t * dk, q + t * dk, next, b.decay[head * b.n + t], delta(t, value, seen)};
      const int64_t entry = t - (piece.end - piece.tentative);
      if (entry >= 0) store_columns(journal_delta(entry), token.delta, width);
      write(token, &out, next != nullptr ? &seen : nullptr);
      store_columns(value, out, width);
    }
  }
};

// Journals decays and keys of a piece's tentative tokens. Tasks only read the old entries.
inline void write_journal(const DeltaBlock& b, const Piece& piece) {
  const GatedDeltaNet& layer = b.layer;
  const int64_t ratio = layer.num_v_heads / layer.num_k_heads;
  for (int64_t j = 0; j < piece.tentative; ++j) {
    const int64_t t = piece.end - piece.tentative + j;
    const int64_t entry = (piece.row * b.cache.max_rollback + j) * layer.num_v_heads;
    for (int64_t h = 0; h < layer.num_v_heads; ++h) {
      const float* key = b.unit(layer.num_k_heads + h / ratio) + t * layer.dk;
      b.cache.journal_g[entry + h] = b.log_decay[h * b.n + t];
      copy_floats(b.cache.journal_k + (entry + h) * layer.dk, key, layer.dk);
    }
  }
}

inline void delta_rule(const DeltaBlock& b) {
  const Timed timed("gdn.delta");
  const int64_t slabs = (b.layer.dv + kSlab - 1) / kSlab, tasks = b.layer.num_v_heads * slabs;
  // With few tokens a task is bound by memory, in which whole heads are contiguous.
  const int64_t grain = b.n <= 4 * b.num_pieces ? slabs : 1;
  parallel(b.num_pieces * tasks, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      DeltaTask(b, b.pieces[i / tasks], i % tasks / slabs, i % slabs).run();
    }
  });
  bool tentative = false;
  for (int64_t p = 0; p < b.num_pieces; ++p) tentative = tentative || b.pieces[p].tentative > 0;
  if (!tentative) return;
  parallel(b.num_pieces, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) write_journal(b, b.pieces[p]);
  });
}

// ---- Projections and the whole ---------------------------------------------------------------------

inline void delta_in(const DeltaBlock& b, const float* x) {
  const Timed timed("gdn.in_proj");
  const int64_t hidden = b.layer.hidden;
  float* normed = take<float>(b.n * hidden);
  parallel(b.n, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      norm_row(x + t * hidden, b.layer.norm, hidden, b.layer.eps, normed + t * hidden);
    }
  });
  Needs needs;
  needs.add(b.layer.qkvz.format);
  needs.add(b.layer.ba.format);
  const Rows rows = quantize(normed, b.n, hidden, hidden, needs);
  product(b.layer.qkvz, rows, nullptr, b.mixed, b.stride);
  product(b.layer.ba, rows, nullptr, b.ba, 2 * b.layer.num_v_heads);
}

// out [Dv] = x / rms(x) * norm * silu(z).
inline void gated_norm(const float* x, const float* z, const float* norm, int64_t dv, float eps, float* out) {
  norm_row(x, norm, dv, eps, out);
  for (int64_t c = 0; c < dv; c += W) {
    store_some(out + c, mul(load_some(out + c, dv - c), silu(load_some(z + c, dv - c))), dv - c);
  }
}

inline void delta_out(const DeltaBlock& b, float* x) {
  const Timed timed("gdn.out_proj");
  const int64_t heads = b.layer.num_v_heads, dv = b.layer.dv, width = b.value_channels(),
                hidden = b.layer.hidden;
  float* normed = take<float>(b.n * width);
  parallel(b.n * heads, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / heads, h = i % heads;
      gated_norm(b.values(h) + t * dv, b.mixed + t * b.stride + b.channels() + h * dv, b.layer.out_norm, dv,
                 b.layer.eps, normed + i * dv);
    }
  });
  float* out = take<float>(b.n * hidden);
  product(b.layer.out, quantize(normed, b.n, width, width, b.layer.out), nullptr, out, hidden);
  parallel(b.n, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * hidden; i < end * hidden; ++i) x[i] += out[i];
  });
}

// Takes the pieces of the next block. Tentative tokens stay in one piece, since they share a journal.
inline void take_pieces(DeltaBlock* b, const Batch& batch, DeltaCursor* next) {
  const int64_t first = next->token;
  while (next->seq < batch.num_seqs) {
    const int64_t s = next->seq, begin = next->token, end = batch.cu_seqlens[s + 1];
    const int64_t sure_end = end - batch.num_tentative[s];
    int64_t cut = first + kDeltaTokens < end ? first + kDeltaTokens : end;
    if (cut < end && cut > sure_end) cut = sure_end;
    if (cut <= begin && begin < end) {
      if (begin > first) break;
      cut = end;  // more tentative tokens than a block has
    }
    const int64_t pending = begin == batch.cu_seqlens[s] ? batch.pending[s] : 0;
    b->pieces[b->num_pieces++] = {batch.state_rows[s], begin - first, cut - first,
                                  cut == end ? batch.num_tentative[s] : 0, pending};
    next->token = cut;
    if (cut < end) break;
    ++next->seq;
  }
  b->n = next->token - first;
}

inline void delta_block(const GatedDeltaNet& layer, const Batch& batch, const RecurrentCache& cache,
                        DeltaCursor* next, float* x) {
  arena().reset();
  DeltaBlock b = {layer, cache};
  b.pieces = take<Piece>(batch.num_seqs - next->seq);
  x += next->token * layer.hidden;
  take_pieces(&b, batch, next);
  // One vector more than whole tiles: rows a multiple of the page size apart would compete for few cache
  // sets.
  b.stride = num_tiles(layer.qkvz.rows) * kTileRows + kTileRows;
  b.mixed = take<float>(b.n * b.stride);
  b.ba = take<float>(b.n * 2 * layer.num_v_heads);
  b.heads = take<float>(b.n * b.channels());
  b.log_decay = take<float>(b.n * layer.num_v_heads);
  b.decay = take<float>(b.n * layer.num_v_heads);
  b.beta = take<float>(b.n * layer.num_v_heads);
  delta_in(b, x);
  delta_conv(b);
  delta_rule(b);
  delta_out(b, x);
}

inline void gated_delta_net(const GatedDeltaNet& layer, const Batch& batch, const RecurrentCache& cache,
                            float* x) {
  DeltaCursor next;
  while (next.seq < batch.num_seqs) delta_block(layer, batch, cache, &next, x);
}
