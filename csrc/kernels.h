// The native interface: the machine's features, the layout of packed weights, and the kernels. Plain C++ with
// raw pointers; only bindings.cpp depends on Python. All activations are float32 and contiguous.
//
// Results are reproducible: a row's result does not depend on the number of rows computed with it, on how a
// sequence is split into steps, or on the number of threads. Products with q8 weights are exact integers
// within a group of 32 inputs, those with q4 weights within a span of 256; the groups or spans are added in
// ascending order with one fused multiply-add each, so every instruction set gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace godwit {

// ---- The machine -----------------------------------------------------------------------------------

struct CpuFeature {
  const char* name;
  bool usable;  // the CPU has it and the operating system saves its registers
};

// Every feature that this build checks for on its architecture, present or not, in a fixed order.
const std::vector<CpuFeature>& cpu_features();

// From the simplest to the widest; each implies all before it. avx512 also needs VNNI, VBMI and BF16; amx
// adds the tile unit for int8 and bf16.
enum class InstructionSet { scalar, avx2, avx512, amx };

const char* name_of(InstructionSet set);

// Those that this CPU supports, from the simplest to the widest. Never empty: scalar is always supported.
const std::vector<InstructionSet>& available_instruction_sets();

// The one in use: the widest available, unless another is set.
InstructionSet instruction_set();

// Throws std::invalid_argument, without any change, if the name is unknown or the CPU lacks the set.
void set_instruction_set(std::string_view name);

// Logical cores this process may use: its affinity mask, limited by the CPU quota of its cgroup (v2 and v1),
// rounded up. At least 1. `root` is a prefix of /proc and /sys.
int num_cores(const std::string& root = "");

// ---- Threads and scratch memory (threads.cpp) ------------------------------------------------------

// Work on items [begin, end) by thread number `thread` (0 is the caller).
using Task = void (*)(void* context, int64_t begin, int64_t end, int thread);

int num_threads();
void set_num_threads(int count);  // at least 1; throws std::invalid_argument otherwise

// Runs `task` over [0, count) in chunks of `grain` items that threads take one at a time, and returns when
// all are done. The caller works too and does not depend on other threads starting: a thread that has lost
// its core only delays its current chunk. Waiting spins for a bounded time, then sleeps. Not re-entrant.
void parallel_for(int64_t count, int64_t grain, Task task, void* context);

// The same for any callable f(begin, end, thread). Lambdas make this template distinct in every translation
// unit.
template <typename F>
static inline void parallel(int64_t count, int64_t grain, const F& f) {
  parallel_for(
      count, grain,
      [](void* context, int64_t begin, int64_t end, int thread) {
        (*static_cast<const F*>(context))(begin, end, thread);
      },
      const_cast<F*>(&f));
}

// Memory for one op, 64-byte aligned and uninitialised; it stays allocated for the next op and is reused
// after reset. Only the calling thread allocates from it. Growing does not move earlier allocations.
class Arena {
 public:
  void reset();
  void* take_bytes(size_t bytes);
  size_t reserved() const;  // bytes held
};
Arena& arena();

template <typename T>
static inline T* take(int64_t count) {
  return static_cast<T*>(arena().take_bytes(static_cast<size_t>(count) * sizeof(T)));
}

// At least `bytes` of 64-byte aligned scratch of this thread, kept between calls; contents are undefined.
void* thread_scratch(size_t bytes);

// Measures the time of a scope for the profile. Names are string literals; nothing is measured unless
// profiling is on. Only for op-level code on the calling thread.
class Timed {
 public:
  explicit Timed(const char* name);
  ~Timed();
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  const char* name_;
  int64_t start_;
};

// Seconds and calls by name since profiling was switched on.
struct ProfileEntry {
  const char* name;
  double seconds;
  int64_t calls;
};
void set_profiling(bool on);  // switching it on clears earlier measurements
std::vector<ProfileEntry> profile();

// ---- Packed weights --------------------------------------------------------------------------------

enum class Format : int { bf16 = 0, q8 = 1, q4 = 2 };

constexpr int64_t kTileRows = 16;  // output rows interleaved in a tile
constexpr int64_t kGroup = 32;     // inputs that share a scale (q8) or a step (q4)
constexpr int64_t kSpan = 8;       // groups that share a scale in q4

// A matrix [rows, cols] as consecutive tiles of 16 rows and all columns. Missing rows of the last tile and
// missing columns are zero. G = groups(cols) groups of 32 columns, rounded up to an even number, and
// S = spans(cols) spans of 8 groups. A tile is
//   q4:   G x 256 bytes of codes, then G x 16 steps [group][row] of a byte, then S x 16 half-precision scales
//         [span][row], then zeros up to a multiple of 64. A step is size + 16 * zero, and
//         weight = (code - zero) * size * scale; size * max(zero, 15 - zero) is at most 127, so that the
//         weight without the scale fits in a signed byte.
//         In a group's 256 bytes, byte 64 v + 4 r + j holds of row r column 4 v + j in its low and column
//         16 + 4 v + j in its high nibble, v < 4, j < 4.
//   q8:   G x 512 bytes of codes, then G x 16 half-precision scales [group][row]. Weight = (code - 128) *
//         scale, codes 1 to 255. Byte 64 v + 4 r + j of a group holds column 4 v + j of row r, v < 8.
//   bf16: G x 1024 bytes. Element 32 v + 2 r + j of a group is column 2 v + j of row r, v < 16, j < 2.
struct Weight {
  Format format = Format::bf16;
  int64_t rows = 0, cols = 0;
  const uint8_t* data = nullptr;  // 64-byte aligned; null: no such weight
};

// Static, like all definitions here: translation units built for different CPUs must not share symbols.
static constexpr int64_t groups(int64_t cols) { return (cols + 2 * kGroup - 1) / (2 * kGroup) * 2; }
static constexpr int64_t spans(int64_t cols) { return (groups(cols) + kSpan - 1) / kSpan; }
static constexpr int64_t num_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
static constexpr int64_t code_bytes(Format f) {  // of a group of a tile
  return f == Format::q4 ? 256 : f == Format::q8 ? 512 : 1024;
}
static constexpr int64_t tile_bytes(Format f, int64_t cols) {
  const int64_t codes = groups(cols) * code_bytes(f);
  if (f == Format::bf16) return codes;
  if (f == Format::q8) return codes + groups(cols) * 2 * kTileRows;
  return (codes + groups(cols) * kTileRows + spans(cols) * 2 * kTileRows + 63) / 64 * 64;
}
static constexpr int64_t weight_bytes(Format f, int64_t rows, int64_t cols) {
  return num_tiles(rows) * tile_bytes(f, cols);
}
static_assert(tile_bytes(Format::q4, 2048) == 64 * 272 + 8 * 32 && tile_bytes(Format::q4, 100) == 1152);
static_assert(tile_bytes(Format::q8, 32) == 2 * 544 && tile_bytes(Format::bf16, 64) == 2048);

// ---- Layers ----------------------------------------------------------------------------------------

// Norm factors are complete: 1 + weight if the family's norm is zero-centered.

struct Batch {  // the tokens of S sequences packed on one axis of T
  int64_t num_tokens = 0, num_seqs = 0, table_width = 0;
  const int64_t* positions = nullptr;      // [T]
  const int64_t* cu_seqlens = nullptr;     // [S + 1]
  const int64_t* seq_lens = nullptr;       // [S] including this step's tokens
  const int64_t* slot_mapping = nullptr;   // [T] block * 16 + place
  const int64_t* block_tables = nullptr;   // [S, table_width]
  const int64_t* state_rows = nullptr;     // [S]
  const int64_t* num_tentative = nullptr;  // [S] last tokens of this step that may be undone
  const int64_t* pending = nullptr;        // [S] valid journaled tokens of the previous step
};

constexpr int64_t kBlock = 16;  // tokens of a KV block

// Keys and values of one attention layer in bf16. In a block, the keys of a head are [D / 2][16 tokens][2
// dims] and its values [8 token pairs][D][2 tokens], one head after another, so that the dot products can
// load them without shuffling.
struct PagedCache {
  uint16_t* k = nullptr;
  uint16_t* v = nullptr;
};

struct RecurrentCache {            // of one delta layer; see godwit.models.caches
  float* conv = nullptr;           // [rows, history + max_rollback, C] raw inputs, the newest last
  float* state = nullptr;          // [rows, V, Dk, Dv] without the journal's tokens
  float* journal_g = nullptr;      // [rows, max_rollback, V] log decay
  float* journal_k = nullptr;      // [rows, max_rollback, V, Dk] normalised keys
  float* journal_delta = nullptr;  // [rows, max_rollback, V, Dv]
  int64_t history = 0, max_rollback = 0;
};

struct GatedDeltaNet {
  const float* norm = nullptr;      // [H] the layer's input norm
  Weight qkvz, ba, out;             // rows query | key | value | z and b | a; heads in natural order
  const float* conv = nullptr;      // [C, kernel], C = 2 K Dk + V Dv
  const float* decay = nullptr;     // [V] -exp(A_log)
  const float* dt_bias = nullptr;   // [V]
  const float* out_norm = nullptr;  // [Dv]
  int64_t num_k_heads = 0, num_v_heads = 0, dk = 0, dv = 0, kernel = 0, hidden = 0;
  float eps = 0;
};

struct Attention {
  const float* norm = nullptr;      // [H]
  Weight in, out;                   // in: rows query | gate | key | value; gate rows only if there is a gate
  const float* in_bias = nullptr;   // or null
  const float* out_bias = nullptr;  // or null
  const float* q_norm = nullptr;    // [D] or null
  const float* k_norm = nullptr;    // [D] or null
  const float* inv_freq = nullptr;  // [rotary_half]
  int64_t num_heads = 0, num_kv_heads = 0, dim = 0, rotary_half = 0, hidden = 0;
  bool gate = false;
  float eps = 0, rope_scale = 1;  // cosines and sines are multiplied by rope_scale
};

struct Mlp {  // SwiGLU; w13 has the gate's rows, then up's
  Weight w13, w2;
  const float* bias13 = nullptr;  // or null
  const float* bias2 = nullptr;   // or null
};

struct Ffn {  // dense: only `shared`, and shared_gate null; sparse: router, experts and optionally a shared
              // expert
  const float* norm = nullptr;  // [H]
  int64_t hidden = 0;
  Mlp shared;                          // w13.data null if there is none
  const float* shared_gate = nullptr;  // [H] factors of the sigmoid gate; null: ungated
  Weight router;                       // [E, H]; data null in a dense layer
  int64_t num_experts = 0, top_k = 0, intermediate = 0;
  float eps = 0;
  bool renormalize = false;
  Format format13 = Format::q4, format2 = Format::q4;  // of the experts' w13 [2 I, H] and w2 [H, I]
  const uint8_t* const* experts = nullptr;             // [E] start of each: w13, then w2 at offset2
  int64_t offset2 = 0;
};

// ---- The kernels -----------------------------------------------------------------------------------

// The arithmetic of products: int8 with weights in q4 and q8, bf16 in attention, float32 everywhere else. If
// an instruction set has no bf16 products, attention uses float32.
enum class Arithmetic : int { int8 = 0, bfloat16 = 1, float32 = 2 };

// One table per instruction set. All ops run on the thread pool, one op at a time (callers hold a lock).
struct KernelTable {
  // out [M, rows] = x [M, cols] w^T + bias [rows] (null: none).
  void (*linear)(const float* x, int64_t m, const Weight& w, const float* bias, float* out);
  // out [M, cols] = rows `ids` [M] of w, in float32.
  void (*embed)(const Weight& w, const int64_t* ids, int64_t m, float* out);
  // out [M, n] = x / rms(x) * factor; out may be x.
  void (*rms_norm)(const float* x, const float* factor, int64_t m, int64_t n, float eps, float* out);
  // x [T, H] += mixer(norm(x)); the caches advance.
  void (*gated_delta_net)(const GatedDeltaNet& layer, const Batch& batch, const RecurrentCache& cache,
                          float* x);
  void (*attention)(const Attention& layer, const Batch& batch, const PagedCache& cache, float* x);
  // x [T, H] += ffn(norm(x)); router_logits [T, E] or null receives the router's logits.
  void (*ffn)(const Ffn& layer, int64_t num_tokens, float* x, float* router_logits);
  // The k largest of values [n] in descending order; among equals, the lower index comes first.
  void (*top_k)(const float* values, int64_t n, int64_t k, float* top, int64_t* ids);
  // Runs `rounds` rounds of multiply-adds in registers on this thread; returns the number of operations, two
  // per multiply-add. `out` receives a number that depends on all of them.
  int64_t (*multiply)(Arithmetic kind, int64_t rounds, float* out);
  // Packs rows x cols floats (`f`, or bf16 in `h`, the other null) into out [weight_bytes]; `spread` [groups
  // * 32] or null is the weight of a squared error in each column. Returns the largest |weight|, or NaN if
  // there is a NaN.
  float (*pack)(Format format, const float* f, const uint16_t* h, int64_t rows, int64_t cols,
                const float* spread, uint8_t* out);
};

const KernelTable& kernels();  // of the instruction set in use

extern const KernelTable kScalarTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const KernelTable kAmxTable;
#endif

// GB/s when reading `bytes` of memory once with all threads, the best of `repeats`.
double read_bandwidth(int64_t bytes, int repeats);

// 10^9 operations per second of all threads together with the instruction set in use, the best of as many
// tries as fit in `seconds`, at least one.
double peak(Arithmetic kind, double seconds);

}  // namespace godwit
