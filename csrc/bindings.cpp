// The Python bindings of the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// ---- Running an op ---------------------------------------------------------------------------------

std::mutex& op_mutex() {
  static auto& mutex = *new std::mutex;  // outlives every thread
  return mutex;
}

// The number of ops running without the interpreter's lock, and whether the interpreter is about to exit.
// From then on it terminates threads that wait for its lock, which is not safe inside C++ frames, so ops keep
// the lock.
std::atomic<int> num_unlocked{0};
std::atomic<bool> ending{false};

// One op at a time, without the interpreter's lock, in the default floating-point environment: other rounding
// modes or flushing of denormals on this thread must not change results.
class Op {
 public:
  Op() {
    if (!ending) {
      ++num_unlocked;
      released_ = PyEval_SaveThread();
    }
    op_mutex().lock();
    std::fegetenv(&environment_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~Op() {
    std::fesetenv(&environment_);
    op_mutex().unlock();
    if (released_ != nullptr) {
      PyEval_RestoreThread(released_);
      --num_unlocked;
    }
  }
  Op(const Op&) = delete;
  Op& operator=(const Op&) = delete;

 private:
  PyThreadState* released_ = nullptr;
  std::fenv_t environment_;
};

#include "bindings-inl.h"

// A fork waits for the current op, so that in the child the state is consistent and the mutex free.
void keep_forks_out() {
  pthread_atfork([] { op_mutex().lock(); }, [] { op_mutex().unlock(); },
                 [] {
                   num_unlocked = 0;  // their threads are not in the child
                   op_mutex().unlock();
                 });
}

// Before the interpreter is finalised: ops keep its lock from now on, and the workers are stopped.
void end_ops() {
  ending = true;
  while (num_unlocked > 0) {
    const nb::gil_scoped_release release;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const Op op;
  godwit::set_num_threads(godwit::num_threads());
}

// ---- Ops -------------------------------------------------------------------------------------------

void linear(nb::handle x_object, const Weight& w, nb::handle bias_object, nb::handle out_object) {
  const auto x = array<float>(x_object, "x", {kAny, w.w.cols});
  const auto bias = optional_vector(bias_object, "bias", w.w.rows);
  const auto out = mutable_array<float>(out_object, "out", {x.shape[0], w.w.rows});
  require(out.data >= x.data + x.size() || x.data >= out.data + out.size(), "out must not overlap x.");
  const Op op;
  godwit::kernels().linear(x.data, x.shape[0], w.w, bias.data, out.data);
}

void embed(const Weight& w, nb::handle ids_object, nb::handle out_object) {
  const auto ids = array<int64_t>(ids_object, "ids", {kAny});
  const int64_t m = ids.shape[0], rows = w.w.rows;
  require(std::all_of(ids.data, ids.data + m, [rows](int64_t id) { return id >= 0 && id < rows; }),
          "ids must lie between 0 and the number of rows of w.");
  const auto out = mutable_array<float>(out_object, "out", {m, w.w.cols});
  const Op op;
  godwit::kernels().embed(w.w, ids.data, m, out.data);
}

void rms_norm(nb::handle x_object, nb::handle factor_object, float eps, nb::handle out_object) {
  const auto x = array<float>(x_object, "x", {kAny, kAny});
  const auto factor = array<float>(factor_object, "factor", {x.shape[1]});
  const auto out = mutable_array<float>(out_object, "out", x.shape);
  const Op op;
  godwit::kernels().rms_norm(x.data, factor.data, x.shape[0], x.shape[1], eps, out.data);
}

void gated_delta_net(const GatedDeltaNet& layer, const Batch& batch, const RecurrentCache& cache,
                     nb::handle x_object) {
  const auto x = mutable_array<float>(x_object, "x", {batch.num_tokens(), layer.layer.hidden});
  layer.check(batch, cache);
  const Op op;
  godwit::kernels().gated_delta_net(layer.layer, batch.view(), cache.view(), x.data);
}

void attention(const Attention& layer, const Batch& batch, const PagedCache& cache, nb::handle x_object) {
  const auto x = mutable_array<float>(x_object, "x", {batch.num_tokens(), layer.layer.hidden});
  layer.check(batch, cache);
  const Op op;
  godwit::kernels().attention(layer.layer, batch.view(), {cache.k.data, cache.v.data}, x.data);
}

// The destination of the router's logits of `num_tokens` tokens; null if the object is None.
Array<float, Mutable> router_logits(const Ffn& layer, int64_t num_tokens, nb::handle object) {
  if (object.is_none()) return {};
  require(layer.router.has_value(), "A dense layer has no router logits.");
  return mutable_array<float>(object, "router_logits", {num_tokens, layer.layer.num_experts});
}

void ffn(const Ffn& layer, nb::handle x_object, nb::handle logits_object) {
  const auto x = mutable_array<float>(x_object, "x", {kAny, layer.layer.hidden});
  const auto logits = router_logits(layer, x.shape[0], logits_object);
  const Op op;
  godwit::kernels().ffn(layer.layer, x.shape[0], x.data, logits.data);
}

float pack(std::string_view format_name, nb::handle x_object, nb::handle out_object,
           nb::handle spread_object) {
  const godwit::Format format = format_of(format_name);
  Const any;
  const bool half = nb::try_cast(x_object, any, false) && any.dtype() == Element<uint16_t>::dtype;
  const auto f = half ? Array<float>{} : array<float>(x_object, "x", {kAny, kAny});
  const auto h = half ? array<uint16_t>(x_object, "x", {kAny, kAny}) : Array<uint16_t>{};
  const Shape& shape = half ? h.shape : f.shape;
  const int64_t bytes = checked_weight_bytes(format, shape[0], shape[1]);
  const auto out = array<uint8_t, Mutable>(out_object, "out", {bytes}, 64);
  const auto spread = optional_vector(spread_object, "spread", godwit::groups(shape[1]) * godwit::kGroup);
  const Op op;
  return godwit::kernels().pack(format, f.data, h.data, shape[0], shape[1], spread.data, out.data);
}

std::pair<std::vector<float>, std::vector<int64_t>> top_k(nb::handle values_object, int64_t k) {
  const auto values = array<float>(values_object, "values", {kAny});
  require(k >= 0 && k <= values.shape[0], "k must lie between 0 and the number of values.");
  std::vector<float> top(static_cast<size_t>(k));
  std::vector<int64_t> ids(static_cast<size_t>(k));
  const Op op;
  godwit::kernels().top_k(values.data, values.shape[0], k, top.data(), ids.data());
  return {top, ids};
}

#include "stack-inl.h"

// ---- The module ------------------------------------------------------------------------------------

// Lets a process run with another instruction set than the widest. Importing the module fails if that is
// impossible.
void obey_environment() {
  const char* name = std::getenv("GODWIT_INSTRUCTION_SET");
  if (name == nullptr || *name == '\0') return;
  try {
    godwit::set_instruction_set(name);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("GODWIT_INSTRUCTION_SET: " + std::string(error.what()));
  }
}

void bind_machine(nb::module_& m) {
  m.def(
      "cpu_features",
      [] {
        nb::dict features;
        for (const auto& f : godwit::cpu_features()) features[f.name] = f.usable;
        return features;
      },
      "Each known CPU feature and whether the CPU and the operating system let programs use it.");
  m.def(
      "available_instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const auto set : godwit::available_instruction_sets()) names.emplace_back(godwit::name_of(set));
        return names;
      },
      "The instruction sets this CPU can run, from the plainest ('scalar') to the widest.");
  m.def(
      "instruction_set", [] { return std::string(godwit::name_of(godwit::instruction_set())); },
      "The instruction set in use.");
  m.def(
      "set_instruction_set", [](std::string_view name) { godwit::set_instruction_set(name); }, "name"_a,
      "Use this instruction set from now on; ValueError where the CPU lacks it.");
  m.def(
      "num_cores", [](const std::string& root) { return godwit::num_cores(root); }, "root"_a = "",
      "Logical cores this process may use, by affinity and cgroup quota; at least 1.");
}

void bind_threads(nb::module_& m) {
  m.def(
      "num_threads", [] { return godwit::num_threads(); },
      "Threads that ops use: one for each core until another number is set.");
  m.def(
      "set_num_threads",
      [](int count) {
        const Op op;
        godwit::set_num_threads(count);
      },
      "count"_a, "Let ops use this many threads, the calling one included.");
  m.def(
      "read_bandwidth",
      [](int64_t bytes, int repeats) {
        require(bytes > 0 && repeats > 0, "bytes and repeats must be positive.");
        const Op op;
        return godwit::read_bandwidth(bytes, repeats);
      },
      "bytes"_a, "repeats"_a = 3, "GB/s of reading memory with all threads, the best of some repeats.");
  m.def(
      "peak",
      [](std::string_view arithmetic, double seconds) {
        const godwit::Arithmetic kind = arithmetic_of(arithmetic);
        require(seconds >= 0 && seconds <= 60, "seconds must lie between 0 and 60.");
        const Op op;
        return godwit::peak(kind, seconds);
      },
      "arithmetic"_a, "seconds"_a = 0.1,
      "10^9 operations a second with all threads and the instruction set in use, the best of some tries.");
  m.def(
      "set_profiling",
      [](bool on) {
        const Op op;
        godwit::set_profiling(on);
      },
      "on"_a, "Measure where time goes from now on, or stop; switching it on forgets what was measured.");
  m.def(
      "profile",
      [] {
        std::vector<godwit::ProfileEntry> entries;
        {
          const Op op;
          entries = godwit::profile();
        }
        nb::dict result;
        for (const auto& entry : entries) result[entry.name] = nb::make_tuple(entry.seconds, entry.calls);
        return result;
      },
      "Seconds and calls by name; a name's seconds include those of what it calls.");
  m.def(
      "scratch_bytes",
      [] {
        const Op op;
        return godwit::arena().reserved();
      },
      "Memory that ops keep for their intermediate results.");
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(end_ops));
}

void bind_arrays(nb::module_& m) {
  m.attr("FORMATS") = nb::make_tuple(kFormatNames[0], kFormatNames[1], kFormatNames[2]);
  m.def(
      "weight_bytes",
      [](std::string_view format, int64_t rows, int64_t cols) {
        return checked_weight_bytes(format_of(format), rows, cols);
      },
      "format"_a, "rows"_a, "cols"_a, "Bytes of a packed matrix.");
  nb::class_<Weight>(m, "Weight", "A packed matrix [rows, cols].")
      .def(nb::new_(&make_weight), "format"_a, "rows"_a, "cols"_a, "data"_a)
      .def_prop_ro("format", [](const Weight& w) { return kFormatNames[static_cast<int>(w.w.format)]; })
      .def_prop_ro("rows", [](const Weight& w) { return w.w.rows; })
      .def_prop_ro("cols", [](const Weight& w) { return w.w.cols; })
      .def_prop_ro("nbytes", [](const Weight& w) { return w.holder.nbytes(); });
  nb::class_<Batch>(m, "Batch", "The tokens of a step; the arrays are copied.")
      .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle,
                    nb::handle>(),
           "positions"_a, "cu_seqlens"_a, "seq_lens"_a, "slot_mapping"_a, "block_tables"_a, "state_rows"_a,
           "num_tentative"_a, "pending"_a);
  nb::class_<PagedCache>(m, "PagedCache", "Keys and values of one attention layer.")
      .def(nb::init<nb::handle, nb::handle>(), "k"_a, "v"_a);
  nb::class_<RecurrentCache>(m, "RecurrentCache",
                             "Convolution inputs, states and journal of one delta layer.")
      .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, int64_t>(), "conv"_a,
           "state"_a, "journal_g"_a, "journal_k"_a, "journal_delta"_a, "history"_a);
}

void bind_layers(nb::module_& m) {
  using H = nb::handle;
  nb::class_<GatedDeltaNet>(m, "GatedDeltaNet", "The weights of a gated delta layer.")
      .def(nb::init<H, const Weight&, const Weight&, const Weight&, H, H, H, H, int64_t, int64_t, int64_t,
                    int64_t, float>(),
           "norm"_a, "qkvz"_a, "ba"_a, "out"_a, "conv"_a, "decay"_a, "dt_bias"_a, "out_norm"_a,
           "num_k_heads"_a, "num_v_heads"_a, "dk"_a, "dv"_a, "eps"_a);
  nb::class_<Attention>(m, "Attention", "The weights of an attention layer.")
      .def(nb::init<H, const Weight&, const Weight&, H, H, H, H, H, int64_t, int64_t, int64_t, bool, float,
                    float>(),
           "norm"_a, "in_proj"_a, "out_proj"_a, "in_bias"_a.none(), "out_bias"_a.none(), "q_norm"_a.none(),
           "k_norm"_a.none(), "inv_freq"_a, "num_heads"_a, "num_kv_heads"_a, "dim"_a, "gate"_a, "eps"_a,
           "rope_scale"_a);
  nb::class_<Mlp>(m, "Mlp", "A SwiGLU: gate and up in w13, down in w2.")
      .def(nb::init<const Weight&, const Weight&, H, H>(), "w13"_a, "w2"_a, "bias13"_a.none() = nb::none(),
           "bias2"_a.none() = nb::none());
  nb::class_<Ffn>(m, "Ffn", "The feed-forward part of a layer.")
      .def(nb::init<H, float, const std::optional<Mlp>&, H, const std::optional<Weight>&, H, int64_t, int64_t,
                    std::string_view, std::string_view, int64_t, int64_t, int64_t, bool>(),
           "norm"_a, "eps"_a, "shared"_a.none(), "shared_gate"_a.none() = nb::none(),
           "router"_a.none() = nb::none(), "experts"_a.none() = nb::none(), "expert_stride"_a = 0,
           "offset2"_a = 0, "format13"_a = "q4", "format2"_a = "q4", "num_experts"_a = 0, "top_k"_a = 0,
           "intermediate"_a = 0, "renormalize"_a = false)
      .def("place_expert", &Ffn::place_expert, "index"_a, "expert"_a,
           "Reads this expert from another array from now on.");
  nb::class_<Stack>(m, "Stack", "Layers and a norm.")
      .def(nb::init<const nb::sequence&, const nb::sequence&, H, float>(), "mixers"_a, "ffns"_a, "norm"_a,
           "eps"_a)
      .def("run", &Stack::run, "batch"_a, "caches"_a, "x"_a, "router_logits"_a.none() = nb::none(),
           "x goes through all layers and the norm, in place; the caches advance.");
}

void bind_ops(nb::module_& m) {
  m.def("linear", &linear, "x"_a, "w"_a, "bias"_a.none(), "out"_a, "out = x w^T + bias.");
  m.def("embed", &embed, "w"_a, "ids"_a, "out"_a, "out = rows `ids` of w.");
  m.def("rms_norm", &rms_norm, "x"_a, "factor"_a, "eps"_a, "out"_a,
        "out = x / rms(x) * factor; out may be x.");
  m.def("gated_delta_net", &gated_delta_net, "layer"_a, "batch"_a, "cache"_a, "x"_a,
        "x += mixer(norm(x)); the cache advances.");
  m.def("attention", &attention, "layer"_a, "batch"_a, "cache"_a, "x"_a,
        "x += mixer(norm(x)); the cache advances.");
  m.def("pack", &pack, "format"_a, "x"_a, "out"_a, "spread"_a.none() = nb::none(),
        "Packs x [rows, cols] into out; gives the largest |x|.");
  m.def("ffn", &ffn, "layer"_a, "x"_a, "router_logits"_a.none() = nb::none(), "x += ffn(norm(x)).");
  m.def("top_k", &top_k, "values"_a, "k"_a, "The k largest values, largest first, and where they are.");
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "What the CPU offers, and the native kernels.";
  nb::set_leak_warnings(false);  // models still in use at exit are not leaks
  obey_environment();
  keep_forks_out();
  bind_machine(m);
  bind_threads(m);
  bind_arrays(m);
  bind_layers(m);
  bind_ops(m);
}
