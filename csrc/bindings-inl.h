// Arguments from Python: arrays, packed weights, a step's tokens, caches and layers. Anything that could make
// a kernel read or write outside its arrays is rejected here. Included only by bindings.cpp, in its anonymous
// namespace.

[[noreturn]] void refuse(const std::string& sentence) { throw nb::value_error(sentence.c_str()); }

// ---- Arrays ----------------------------------------------------------------------------------------

using Const = nb::ndarray<nb::ro>;
using Mutable = nb::ndarray<>;

template <typename T>
struct Element;
template <>
struct Element<float> {
  static constexpr const char* name = "float32";
  static constexpr nb::dlpack::dtype dtype = nb::dtype<float>();
};
template <>
struct Element<int64_t> {
  static constexpr const char* name = "int64";
  static constexpr nb::dlpack::dtype dtype = nb::dtype<int64_t>();
};
template <>
struct Element<uint8_t> {
  static constexpr const char* name = "uint8";
  static constexpr nb::dlpack::dtype dtype = nb::dtype<uint8_t>();
};
template <>
struct Element<uint16_t> {  // kernels see the bits
  static constexpr const char* name = "bfloat16";
  static constexpr nb::dlpack::dtype dtype = {static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
};

constexpr int64_t kAny = -1;
using Shape = std::vector<int64_t>;

std::string text_of(const Shape& shape) {
  std::string text;
  for (const int64_t n : shape) text += (text.empty() ? "" : ", ") + (n == kAny ? "any" : std::to_string(n));
  return "[" + text + "]";
}

// A C-contiguous array of T in the CPU's memory; owns a share of it.
template <typename T, typename Holder = Const>
struct Array {
  Holder holder;
  Shape shape;
  T* data = nullptr;
  int64_t size() const {
    int64_t count = 1;
    for (const int64_t n : shape) count *= n;
    return count;
  }
};

template <typename Holder>
bool is_contiguous(const Holder& array) {
  int64_t expected = 1;
  bool contiguous = true;
  for (size_t i = array.ndim(); i-- > 0;) {
    const auto n = static_cast<int64_t>(array.shape(i));
    if (n == 0) return true;
    if (n != 1 && array.stride(i) != expected) contiguous = false;
    expected *= n;
  }
  return contiguous;
}

// `object` as an array of this shape; kAny allows any size.
template <typename T, typename Holder = Const>
Array<T, Holder> array(nb::handle object, const char* name, const Shape& shape,
                       size_t alignment = sizeof(T)) {
  const std::string who(name);
  Array<T, Holder> result;
  if (!nb::try_cast(object, result.holder, false)) {
    refuse(who + " must be a CPU tensor or array" +
           (std::is_same_v<Holder, Mutable> ? " that can be written." : "."));
  }
  const Holder& held = result.holder;
  if (held.device_type() != nb::device::cpu::value) refuse(who + " must lie in the CPU's memory.");
  if (held.dtype() != Element<T>::dtype) refuse(who + " must hold " + Element<T>::name + ".");
  bool fits = held.ndim() == shape.size();
  for (size_t i = 0; i < held.ndim(); ++i) {
    result.shape.push_back(static_cast<int64_t>(held.shape(i)));
    fits = fits && (shape[i] == kAny || shape[i] == result.shape[i]);
  }
  if (!fits) refuse(who + " must have shape " + text_of(shape) + ", not " + text_of(result.shape) + ".");
  if (!is_contiguous(held)) refuse(who + " must be contiguous.");
  result.data = static_cast<T*>(const_cast<void*>(static_cast<const void*>(held.data())));
  if (reinterpret_cast<uintptr_t>(result.data) % alignment != 0) {
    refuse(who + " must be aligned to " + std::to_string(alignment) + " bytes.");
  }
  return result;
}

template <typename T>
Array<T, Mutable> mutable_array(nb::handle object, const char* name, const Shape& shape) {
  return array<T, Mutable>(object, name, shape);
}

// A vector of floats, or nothing if the object is None.
Array<float> optional_vector(nb::handle object, const char* name, int64_t size) {
  return object.is_none() ? Array<float>{} : array<float>(object, name, {size});
}

void require(bool holds, const char* sentence) {
  if (!holds) refuse(sentence);
}

// Whether all are positive and their products far from overflow.
bool are_sizes(std::initializer_list<int64_t> sizes) {
  return std::all_of(sizes.begin(), sizes.end(), [](int64_t n) { return n > 0 && n <= 1 << 20; });
}

// ---- Weights ---------------------------------------------------------------------------------------

constexpr const char* kFormatNames[] = {"bf16", "q8", "q4"};

godwit::Format format_of(std::string_view name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kFormatNames[i]) return static_cast<godwit::Format>(i);
  }
  refuse("There is no weight format named '" + std::string(name) + "'; there are bf16, q8 and q4.");
}

constexpr const char* kArithmeticNames[] = {"int8", "bfloat16", "float32"};

godwit::Arithmetic arithmetic_of(std::string_view name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kArithmeticNames[i]) return static_cast<godwit::Arithmetic>(i);
  }
  refuse("There is no arithmetic named '" + std::string(name) + "'; there are int8, bfloat16 and float32.");
}

int64_t checked_weight_bytes(godwit::Format format, int64_t rows, int64_t cols) {
  constexpr int64_t kMax = int64_t{1} << 31;
  if (rows < 1 || cols < 1 || rows > kMax || cols > kMax || rows > (int64_t{1} << 44) / cols) {
    refuse("A weight cannot have " + std::to_string(rows) + " rows and " + std::to_string(cols) +
           " columns.");
  }
  return godwit::weight_bytes(format, rows, cols);
}

struct Weight {
  godwit::Weight w;
  Const holder;
};

Weight make_weight(std::string_view format, int64_t rows, int64_t cols, nb::handle data) {
  const godwit::Format f = format_of(format);
  auto bytes = array<uint8_t>(data, "data", {checked_weight_bytes(f, rows, cols)}, 64);
  return {{f, rows, cols, bytes.data}, std::move(bytes.holder)};
}

void require_shape(const Weight& weight, const char* name, int64_t rows, int64_t cols) {
  const bool fits = (rows == kAny || rows == weight.w.rows) && (cols == kAny || cols == weight.w.cols);
  if (!fits) {
    refuse(std::string(name) + " must have shape " + text_of({rows, cols}) + ", not " +
           text_of({weight.w.rows, weight.w.cols}) + ".");
  }
}

// ---- A step's tokens and the caches ----------------------------------------------------------------

// From an array, or from a list or tuple, which for few numbers avoids creating a tensor.
std::vector<int64_t> numbers(nb::handle object, const char* name, const Shape& shape) {
  std::vector<int64_t> listed;
  if (nb::isinstance<nb::list>(object) || nb::isinstance<nb::tuple>(object)) {
    if (!nb::try_cast(object, listed, false)) refuse(std::string(name) + " must hold integers.");
    const auto size = static_cast<int64_t>(listed.size());
    if (shape[0] != kAny && shape[0] != size) {
      refuse(std::string(name) + " must have shape " + text_of(shape) + ", not " + text_of({size}) + ".");
    }
    return listed;
  }
  const auto values = array<int64_t>(object, name, shape);
  return std::vector<int64_t>(values.data, values.data + values.size());
}

int64_t largest(const std::vector<int64_t>& values) {
  return values.empty() ? -1 : *std::max_element(values.begin(), values.end());
}

// A checked copy of the description of a step's tokens.
class Batch {
 public:
  Batch(nb::handle positions, nb::handle cu_seqlens, nb::handle seq_lens, nb::handle slot_mapping,
        nb::handle block_tables, nb::handle state_rows, nb::handle num_tentative, nb::handle pending)
      : positions_(numbers(positions, "positions", {kAny})),
        seq_lens_(numbers(seq_lens, "seq_lens", {kAny})) {
    const int64_t tokens = static_cast<int64_t>(positions_.size()), seqs = num_seqs();
    cu_seqlens_ = numbers(cu_seqlens, "cu_seqlens", {seqs + 1});
    slot_mapping_ = numbers(slot_mapping, "slot_mapping", {tokens});
    const auto tables = array<int64_t>(block_tables, "block_tables", {seqs, kAny});
    block_tables_.assign(tables.data, tables.data + tables.size());
    table_width_ = tables.shape[1];
    state_rows_ = numbers(state_rows, "state_rows", {seqs});
    num_tentative_ = numbers(num_tentative, "num_tentative", {seqs});
    pending_ = numbers(pending, "pending", {seqs});
    check_lengths();
    check_places();
  }

  godwit::Batch view() const {
    return {num_tokens(),          num_seqs(),           table_width_,
            positions_.data(),     cu_seqlens_.data(),   seq_lens_.data(),
            slot_mapping_.data(),  block_tables_.data(), state_rows_.data(),
            num_tentative_.data(), pending_.data()};
  }
  int64_t num_tokens() const { return static_cast<int64_t>(positions_.size()); }
  int64_t num_seqs() const { return static_cast<int64_t>(seq_lens_.size()); }
  bool whole_tables() const { return whole_tables_; }  // a block for every 16 tokens of every sequence
  int64_t num_blocks() const { return num_blocks_; }   // that the cache must have
  int64_t num_rows() const { return largest(state_rows_) + 1; }
  int64_t max_rollback() const { return std::max<int64_t>({0, largest(num_tentative_), largest(pending_)}); }

 private:
  void check_lengths() const {
    require(cu_seqlens_.front() == 0 && cu_seqlens_.back() == num_tokens(),
            "cu_seqlens must begin with 0 and end with the number of tokens.");
    for (size_t s = 0; s < seq_lens_.size(); ++s) {
      const int64_t length = cu_seqlens_[s + 1] - cu_seqlens_[s];
      require(length >= 0, "cu_seqlens must not descend.");
      require(seq_lens_[s] >= length, "seq_lens must count the tokens of this step too.");
      require(num_tentative_[s] >= 0 && num_tentative_[s] <= length,
              "num_tentative must lie between 0 and the tokens of this step.");
      require(pending_[s] >= 0, "pending must not be negative.");
    }
  }

  void check_places() {
    for (const int64_t position : positions_) require(position >= 0, "positions must not be negative.");
    for (const int64_t slot : slot_mapping_) require(slot >= 0, "slot_mapping must not be negative.");
    if (!slot_mapping_.empty()) num_blocks_ = largest(slot_mapping_) / godwit::kBlock + 1;
    for (size_t s = 0; s < seq_lens_.size(); ++s) {
      // Attention rejects tables that are too short; delta layers need none.
      whole_tables_ = whole_tables_ && seq_lens_[s] <= table_width_ * godwit::kBlock;
      for (int64_t i = 0; i < table_width_ && i * godwit::kBlock < seq_lens_[s]; ++i) {
        const int64_t block = block_tables_[s * static_cast<size_t>(table_width_) + static_cast<size_t>(i)];
        require(block >= 0, "block_tables must not be negative.");
        num_blocks_ = std::max(num_blocks_, block + 1);
      }
    }
    std::vector<int64_t> rows = state_rows_;
    std::sort(rows.begin(), rows.end());
    require(rows.empty() || rows.front() >= 0, "state_rows must not be negative.");
    require(std::adjacent_find(rows.begin(), rows.end()) == rows.end(),
            "Two sequences must not share one of state_rows.");
  }

  std::vector<int64_t> positions_, seq_lens_, cu_seqlens_, slot_mapping_, block_tables_, state_rows_;
  std::vector<int64_t> num_tentative_, pending_;
  int64_t table_width_ = 0, num_blocks_ = 0;
  bool whole_tables_ = true;
};

struct PagedCache {
  PagedCache(nb::handle k_object, nb::handle v_object)
      : k(mutable_array<uint16_t>(k_object, "k", {kAny, godwit::kBlock, kAny, kAny})),
        v(mutable_array<uint16_t>(v_object, "v", k.shape)) {}
  Array<uint16_t, Mutable> k, v;
};

struct RecurrentCache {
  RecurrentCache(nb::handle conv_object, nb::handle state_object, nb::handle g, nb::handle key,
                 nb::handle delta, int64_t num_history)
      : conv(mutable_array<float>(conv_object, "conv", {kAny, kAny, kAny})),
        state(mutable_array<float>(state_object, "state", {conv.shape[0], kAny, kAny, kAny})),
        history(num_history),
        max_rollback(conv.shape[1] - history) {
    require(history >= 0 && max_rollback >= 0, "conv must hold at least `history` tokens.");
    const int64_t rows = state.shape[0], heads = state.shape[1];
    journal_g = mutable_array<float>(g, "journal_g", {rows, max_rollback, heads});
    journal_k = mutable_array<float>(key, "journal_k", {rows, max_rollback, heads, state.shape[2]});
    journal_delta = mutable_array<float>(delta, "journal_delta", {rows, max_rollback, heads, state.shape[3]});
  }
  godwit::RecurrentCache view() const {
    return {conv.data, state.data, journal_g.data, journal_k.data, journal_delta.data, history, max_rollback};
  }
  Array<float, Mutable> conv, state, journal_g, journal_k, journal_delta;
  int64_t history, max_rollback;
};

// ---- Layers ----------------------------------------------------------------------------------------

// Layers own what their pointers refer to.
struct GatedDeltaNet {
  GatedDeltaNet(nb::handle norm_object, const Weight& qkvz_weight, const Weight& ba_weight,
                const Weight& out_weight, nb::handle conv_object, nb::handle decay_object,
                nb::handle dt_bias_object, nb::handle out_norm_object, int64_t num_k_heads,
                int64_t num_v_heads, int64_t dk, int64_t dv, float eps)
      : norm(array<float>(norm_object, "norm", {kAny})), qkvz(qkvz_weight), ba(ba_weight), out(out_weight) {
    require(are_sizes({num_k_heads, num_v_heads, dk, dv}) && num_v_heads % num_k_heads == 0,
            "Value heads must be a multiple of key heads, and all sizes positive.");
    const int64_t hidden = norm.shape[0], channels = 2 * num_k_heads * dk + num_v_heads * dv;
    require_shape(qkvz, "qkvz", channels + num_v_heads * dv, hidden);
    require_shape(ba, "ba", 2 * num_v_heads, hidden);
    require_shape(out, "out", hidden, num_v_heads * dv);
    conv = array<float>(conv_object, "conv", {channels, kAny});
    require(conv.shape[1] > 0, "conv must have at least one tap.");
    decay = array<float>(decay_object, "decay", {num_v_heads});
    dt_bias = array<float>(dt_bias_object, "dt_bias", {num_v_heads});
    out_norm = array<float>(out_norm_object, "out_norm", {dv});
    layer = {norm.data,   qkvz.w,      ba.w, out.w, conv.data,     decay.data, dt_bias.data, out_norm.data,
             num_k_heads, num_v_heads, dk,   dv,    conv.shape[1], hidden,     eps};
  }
  void check(const Batch& batch, const RecurrentCache& cache) const {
    const int64_t channels = conv.shape[0];
    require(cache.conv.shape[2] == channels && cache.history == layer.kernel - 1 &&
                cache.state.shape[1] == layer.num_v_heads && cache.state.shape[2] == layer.dk &&
                cache.state.shape[3] == layer.dv,
            "The recurrent cache was made for a layer of another shape.");
    require(batch.num_rows() <= cache.state.shape[0], "state_rows names a row beyond the recurrent cache.");
    require(batch.max_rollback() <= cache.max_rollback,
            "The recurrent cache keeps fewer tokens undoable than the batch asks for.");
  }
  Array<float> norm, conv, decay, dt_bias, out_norm;
  Weight qkvz, ba, out;
  godwit::GatedDeltaNet layer;
};

struct Attention {
  Attention(nb::handle norm_object, const Weight& in_weight, const Weight& out_weight,
            nb::handle in_bias_object, nb::handle out_bias_object, nb::handle q_norm_object,
            nb::handle k_norm_object, nb::handle inv_freq_object, int64_t num_heads, int64_t num_kv_heads,
            int64_t dim, bool gate, float eps, float rope_scale)
      : norm(array<float>(norm_object, "norm", {kAny})), in(in_weight), out(out_weight) {
    require(are_sizes({num_heads, num_kv_heads, dim}) && num_heads % num_kv_heads == 0 && dim % 2 == 0,
            "Heads must be a multiple of key-value heads, the head's width even, and all sizes positive.");
    const int64_t hidden = norm.shape[0], query = num_heads * dim;
    require_shape(in, "in_proj", query * (gate ? 2 : 1) + 2 * num_kv_heads * dim, hidden);
    require_shape(out, "out_proj", hidden, query);
    in_bias = optional_vector(in_bias_object, "in_bias", in.w.rows);
    out_bias = optional_vector(out_bias_object, "out_bias", hidden);
    q_norm = optional_vector(q_norm_object, "q_norm", dim);
    k_norm = optional_vector(k_norm_object, "k_norm", dim);
    inv_freq = array<float>(inv_freq_object, "inv_freq", {kAny});
    require(2 * inv_freq.shape[0] <= dim,
            "inv_freq must have at most half as many entries as a head is wide.");
    layer = {norm.data,   in.w,          out.w,     in_bias.data, out_bias.data, q_norm.data,
             k_norm.data, inv_freq.data, num_heads, num_kv_heads, dim,           inv_freq.shape[0],
             hidden,      gate,          eps,       rope_scale};
  }
  void check(const Batch& batch, const PagedCache& cache) const {
    require(cache.k.shape[2] == layer.num_kv_heads && cache.k.shape[3] == layer.dim,
            "The paged cache was made for a layer of another shape.");
    require(batch.whole_tables(), "block_tables must have a block for every 16 tokens of a sequence.");
    require(batch.num_blocks() <= cache.k.shape[0],
            "slot_mapping or block_tables names a block beyond the paged cache.");
  }
  Array<float> norm, in_bias, out_bias, q_norm, k_norm, inv_freq;
  Weight in, out;
  godwit::Attention layer;
};

struct Mlp {
  Mlp(const Weight& gate_up, const Weight& down, nb::handle bias13_object, nb::handle bias2_object)
      : w13(gate_up), w2(down) {
    require_shape(w13, "w13", 2 * w2.w.cols, w2.w.rows);
    bias13 = optional_vector(bias13_object, "bias13", w13.w.rows);
    bias2 = optional_vector(bias2_object, "bias2", w2.w.rows);
  }
  godwit::Mlp view() const { return {w13.w, w2.w, bias13.data, bias2.data}; }
  Weight w13, w2;
  Array<float> bias13, bias2;
};

struct ExpertTable {  // where each expert lies, and what keeps it there
  std::vector<const uint8_t*> places;
  std::vector<Const> holders;
};

struct Ffn {
  Ffn(nb::handle norm_object, float eps, const std::optional<Mlp>& shared_mlp, nb::handle shared_gate_object,
      const std::optional<Weight>& router_weight, nb::handle experts_object, int64_t expert_stride,
      int64_t offset2, std::string_view format13, std::string_view format2, int64_t num_experts,
      int64_t top_k, int64_t intermediate, bool renormalize)
      : norm(array<float>(norm_object, "norm", {kAny})), shared(shared_mlp), router(router_weight) {
    layer.norm = norm.data;
    layer.hidden = norm.shape[0];
    layer.eps = eps;
    require(shared || router, "A layer needs a router, a shared part or both.");
    require(!router == experts_object.is_none(), "A router and experts come together.");
    if (shared) {
      require_shape(shared->w2, "w2 of shared", layer.hidden, kAny);
      layer.shared = shared->view();
    }
    shared_gate = optional_vector(shared_gate_object, "shared_gate", layer.hidden);
    require(shared_gate.data == nullptr || (shared && router),
            "shared_gate needs a shared expert and a router.");
    layer.shared_gate = shared_gate.data;
    if (!router) return;
    require_shape(*router, "router", num_experts, layer.hidden);
    require(top_k >= 1 && top_k <= num_experts, "top_k must lie between 1 and the number of experts.");
    layer.router = router->w;
    layer.num_experts = num_experts;
    layer.top_k = top_k;
    layer.intermediate = intermediate;
    layer.renormalize = renormalize;
    layer.format13 = format_of(format13);
    layer.format2 = format_of(format2);
    layer.offset2 = offset2;
    check_expert_layout(expert_stride);
    require(expert_stride <= INT64_MAX / num_experts, "experts must be smaller.");
    const auto all = array<uint8_t>(experts_object, "experts", {num_experts * expert_stride}, 64);
    experts = std::make_shared<ExpertTable>();
    experts->holders.assign(static_cast<size_t>(num_experts), all.holder);
    for (int64_t e = 0; e < num_experts; ++e) experts->places.push_back(all.data + e * expert_stride);
    layer.experts = experts->places.data();
  }

  // From the next op on, expert `e` is read from `object` [at least offset2 + bytes of w2].
  void place_expert(int64_t e, nb::handle object) const {
    require(experts != nullptr, "A dense layer has no experts.");
    require(e >= 0 && e < layer.num_experts, "There is no such expert.");
    auto place = array<uint8_t>(object, "expert", {kAny}, 64);
    require(place.shape[0] >= layer.offset2 + bytes2(), "expert must hold w13 and, at offset2, w2.");
    const Op op;  // no kernel is reading the table
    experts->places[static_cast<size_t>(e)] = place.data;
    std::swap(experts->holders[static_cast<size_t>(e)], place.holder);
  }

  void check_expert_layout(int64_t stride) const {
    const int64_t bytes13 = checked_weight_bytes(layer.format13, 2 * layer.intermediate, layer.hidden);
    require(layer.offset2 % 64 == 0 && stride % 64 == 0 && stride > 0,
            "offset2 and expert_stride must be multiples of 64.");
    require(layer.offset2 >= bytes13 && layer.offset2 <= stride - bytes2(),
            "An expert's w13 must end before offset2 and its w2 before expert_stride.");
  }

  int64_t bytes2() const { return checked_weight_bytes(layer.format2, layer.hidden, layer.intermediate); }

  Array<float> norm, shared_gate;
  std::optional<Mlp> shared;
  std::optional<Weight> router;
  std::shared_ptr<ExpertTable> experts;  // shared by the copies of this layer: all see an expert move
  godwit::Ffn layer;
};
