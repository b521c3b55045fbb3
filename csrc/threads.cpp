// The thread pool, scratch memory, the profile, and measurements of memory bandwidth and arithmetic.
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "kernels.h"

namespace godwit {
namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Number of this thread while it runs a task, -1 otherwise.
thread_local int task_thread = -1;

// ---- The pool --------------------------------------------------------------------------------------

// Longer than the serial code between two jobs of an op, but short enough not to keep the core from others.
constexpr int64_t kSpinNs = 50'000;

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns true as soon as `ready()` does, or false after kSpinNs.
template <typename F>
bool spin_until(const F& ready) {
  const int64_t deadline = now_ns() + kSpinNs;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      pause_core();
    }
  } while (now_ns() < deadline);
  return false;
}

// Items [first, last) in chunks of `grain` on this thread.
void run_chunks(int64_t first, int64_t last, int64_t grain, Task task, void* context, int thread) noexcept {
  const int outer = std::exchange(task_thread, thread);
  for (int64_t begin = first; begin < last; begin += grain) {
    task(context, begin, std::min(begin + grain, last), thread);
  }
  task_thread = outer;
}

// Workers 1 to n - 1; the caller of run is thread 0.
//
// A ticket holds the number of the job and its chunks that are still free. A thread takes a chunk by a
// compare and swap of the whole ticket, so a thread that read the job's fields and then lost its core cannot
// take a chunk of a later job with them: if the swap succeeds, a chunk of that same job was free, and the
// caller, which waits for all chunks, has not changed the fields. Nothing waits for a worker that has no
// chunk.
class Pool {
 public:
  explicit Pool(int num_threads) {
    try {
      for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error&) {  // no more threads to be had: those that are there, and the caller
    }
  }

  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_.store(true);
    }
    work_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  void run(int64_t count, int64_t grain, Task task, void* context) {
    grain = std::max(grain, count / kMaxChunks + 1);
    const int64_t chunks = (count + grain - 1) / grain;
    count_.store(count, std::memory_order_relaxed);
    grain_.store(grain, std::memory_order_relaxed);
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    unfinished_.store(chunks, std::memory_order_relaxed);
    // Sequentially consistent, like a sleeper's announcement, so that one of the two sees the other.
    ticket_.store((static_cast<uint64_t>(++job_) << 32) | static_cast<uint64_t>(chunks));
    if (num_sleeping_.load() > 0) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
      }
      work_.notify_all();
    }
    while (take_chunk(0)) {
    }
    wait_for_chunks();
  }

 private:
  static constexpr int64_t kMaxChunks = int64_t{1} << 31;

  static uint32_t job_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }
  static int64_t free_chunks(uint64_t ticket) { return static_cast<int64_t>(ticket & 0xffffffffU); }

  // Takes a chunk of the current job and runs it; false if none is free.
  bool take_chunk(int thread) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (free_chunks(ticket) > 0) {
      const int64_t count = count_.load(std::memory_order_relaxed);
      const int64_t grain = grain_.load(std::memory_order_relaxed);
      const Task task = task_.load(std::memory_order_relaxed);
      void* context = context_.load(std::memory_order_relaxed);
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                         std::memory_order_acquire)) {
        continue;
      }
      const int64_t chunks = (count + grain - 1) / grain;
      const int64_t begin = (chunks - free_chunks(ticket)) * grain;
      run_chunks(begin, std::min(begin + grain, count), grain, task, context, thread);
      if (unfinished_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
        {
          const std::lock_guard<std::mutex> lock(mutex_);
        }
        done_.notify_one();
      }
      return true;
    }
    return false;
  }

  void wait_for_chunks() {
    const auto done = [this] { return unfinished_.load() == 0; };
    if (spin_until(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    done_.wait(lock, done);
    caller_sleeps_.store(false);
  }

  void work(int thread) {
    std::fesetenv(FE_DFL_ENV);  // a thread inherits its creator's rounding and treatment of denormals
    uint32_t seen = 0;
    const auto news = [this, &seen] { return stopping_.load() || job_of(ticket_.load()) != seen; };
    while (true) {
      if (!spin_until(news)) {
        std::unique_lock<std::mutex> lock(mutex_);
        num_sleeping_.fetch_add(1);
        work_.wait(lock, news);
        num_sleeping_.fetch_sub(1);
      }
      if (stopping_.load()) return;
      // Read before the chunks, so that a job published while they run is noticed.
      seen = job_of(ticket_.load());
      while (take_chunk(thread)) {
      }
    }
  }

  // The caller writes a job's fields only while no chunk is free or in flight.
  std::atomic<int64_t> count_{0}, grain_{1};
  std::atomic<Task> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  uint32_t job_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};
  std::atomic<bool> caller_sleeps_{false}, stopping_{false};
  std::atomic<int> num_sleeping_{0};
  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::vector<std::thread> workers_;
};

std::atomic<int> chosen_num_threads{0};  // 0: not chosen

// Created by the first job that needs it. Never destroyed, since a thread may still compute while the process
// exits.
Pool* pool = nullptr;

// In a forked child the workers do not exist, and their mutex may stay locked, so the pool is abandoned.
void forget_pool() { pool = nullptr; }

Pool& get_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  if (pool == nullptr) pool = new Pool(num_threads());
  return *pool;
}

}  // namespace

int num_threads() {
  const int count = chosen_num_threads.load();
  if (count > 0) return count;
  static const int cores = num_cores();
  return cores;
}

void set_num_threads(int count) {
  if (count < 1)
    throw std::invalid_argument("There must be at least 1 thread, not " + std::to_string(count) + ".");
  delete std::exchange(pool, nullptr);
  chosen_num_threads.store(count);
}

void parallel_for(int64_t count, int64_t grain, Task task, void* context) {
  grain = std::max<int64_t>(grain, 1);
  if (task_thread >= 0 || count <= grain || num_threads() == 1) {
    run_chunks(0, count, grain, task, context, std::max(task_thread, 0));
  } else {
    get_pool().run(count, grain, task, context);
  }
}

// ---- Memory ----------------------------------------------------------------------------------------

namespace {

constexpr size_t kAlignment = 64, kHugePage = size_t{2} << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Uninitialised memory, 64-byte aligned; large allocations use huge pages if the system supports them.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) : size_(round_up(bytes, bytes < kHugePage ? kAlignment : kHugePage)) {
    if (size_ < kHugePage) {
      data_ = static_cast<uint8_t*>(::operator new(size_, std::align_val_t{kAlignment}));
      return;
    }
    // One extra huge page, so that the memory can start at a page boundary.
    base_ = mmap(nullptr, size_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    data_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(base_), kHugePage));
#if defined(MADV_HUGEPAGE)
    madvise(data_, size_, MADV_HUGEPAGE);
#endif
  }
  ~Memory() {
    if (base_ != nullptr) {
      munmap(base_, size_ + kHugePage);
    } else if (data_ != nullptr) {
      ::operator delete(data_, std::align_val_t{kAlignment});
    }
  }
  Memory(Memory&& other) noexcept
      : size_(std::exchange(other.size_, 0)),
        data_(std::exchange(other.data_, nullptr)),
        base_(std::exchange(other.base_, nullptr)) {}
  Memory& operator=(Memory other) noexcept {
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    std::swap(base_, other.base_);
    return *this;
  }

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
  uint8_t* data_ = nullptr;
  void* base_ = nullptr;  // of the mapping, where there is one
};

struct Blocks {
  std::vector<Memory> blocks;
  size_t used = 0;  // of the last block
};

Blocks& arena_blocks() {
  static Blocks& blocks = *new Blocks;  // outlives every thread
  return blocks;
}

}  // namespace

size_t Arena::reserved() const {
  size_t total = 0;
  for (const Memory& block : arena_blocks().blocks) total += block.size();
  return total;
}

void Arena::reset() {
  Blocks& all = arena_blocks();
  all.used = 0;
  if (all.blocks.size() < 2) return;
  const size_t total = reserved();
  all.blocks.clear();
  all.blocks.emplace_back(total);
}

void* Arena::take_bytes(size_t bytes) {
  constexpr size_t kFirst = size_t{1} << 20;
  Blocks& all = arena_blocks();
  bytes = round_up(bytes, kAlignment);
  if (all.blocks.empty() || all.blocks.back().size() - all.used < bytes) {
    all.blocks.emplace_back(std::max({bytes, kFirst, reserved() / 2}));
    all.used = 0;
  }
  void* taken = all.blocks.back().data() + all.used;
  all.used += bytes;
  return taken;
}

Arena& arena() {
  static Arena only;
  return only;
}

void* thread_scratch(size_t bytes) {
  thread_local Memory scratch;
  if (scratch.size() < bytes || scratch.data() == nullptr) {
    scratch = Memory();  // give the old one back first
    scratch = Memory(std::max<size_t>(bytes, 4096));
  }
  return scratch.data();
}

// ---- The profile -----------------------------------------------------------------------------------

namespace {

std::atomic<bool> profiling{false};

std::vector<ProfileEntry>& profile_entries() {
  static auto& entries = *new std::vector<ProfileEntry>;
  return entries;
}

}  // namespace

Timed::Timed(const char* name)
    : name_(name), start_(profiling.load(std::memory_order_relaxed) && task_thread < 0 ? now_ns() : -1) {}

Timed::~Timed() {
  if (start_ < 0) return;
  const double seconds = static_cast<double>(now_ns() - start_) * 1e-9;
  for (ProfileEntry& entry : profile_entries()) {
    // Equal literals in two files may have different addresses.
    if (entry.name != name_ && std::strcmp(entry.name, name_) != 0) continue;
    entry.seconds += seconds;
    entry.calls += 1;
    return;
  }
  profile_entries().push_back({name_, seconds, 1});
}

void set_profiling(bool on) {
  if (on) profile_entries().clear();
  profiling.store(on);
}

std::vector<ProfileEntry> profile() { return profile_entries(); }

// ---- Ceilings --------------------------------------------------------------------------------------

double read_bandwidth(int64_t bytes, int repeats) {
  constexpr int64_t kLanes = 16, kGrain = int64_t{1} << 13;  // lanes of 8 bytes in a line; a chunk is 1 MiB
  using Line = uint64_t[kLanes];
  const int64_t lines = std::max<int64_t>(1, bytes / static_cast<int64_t>(sizeof(Line)));
  const Memory buffer(static_cast<size_t>(lines) * sizeof(Line));
  auto* data = reinterpret_cast<Line*>(buffer.data());
  // Written first, since all untouched pages map to the same zero page.
  parallel(lines, kGrain, [=](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) std::fill_n(data[i], kLanes, static_cast<uint64_t>(i));
  });
  std::atomic<uint64_t> sink{0};
  int64_t best = INT64_MAX;
  for (int r = 0; r < std::max(repeats, 1); ++r) {
    const int64_t start = now_ns();
    parallel(lines, kGrain, [&](int64_t begin, int64_t end, int) {
      uint64_t sums[kLanes] = {};
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < kLanes; ++j) sums[j] += data[i][j];
      }
      for (const uint64_t sum : sums) sink.fetch_add(sum, std::memory_order_relaxed);
    });
    best = std::min(best, now_ns() - start);
  }
  return static_cast<double>(lines) * sizeof(Line) / static_cast<double>(std::max<int64_t>(best, 1));
}

double peak(Arithmetic kind, double seconds) {
  constexpr int64_t kShare = 16;             // chunks a thread: one without its core holds up little
  constexpr double kTryNs = 2e6;             // of an undisturbed try: handing out the work must not count
  const auto multiply = kernels().multiply;  // of one instruction set throughout
  const int64_t chunks = num_threads() * kShare;
  const int64_t end = now_ns() + static_cast<int64_t>(seconds * 1e9);
  double best = 0;  // operations a nanosecond
  int64_t rounds = 64;
  for (int tries = 0; tries < 2 || now_ns() < end;) {
    std::atomic<int64_t> operations{0};
    const int64_t start = now_ns();
    parallel(chunks, 1, [&](int64_t first, int64_t last, int) {
      float sum;
      for (int64_t i = first; i < last; ++i) operations += multiply(kind, rounds, &sum);
    });
    const auto done = static_cast<double>(operations.load());
    best = std::max(best, done / static_cast<double>(std::max<int64_t>(now_ns() - start, 1)));
    if (done < best * kTryNs) {
      rounds *= 2;
    } else {
      ++tries;
    }
  }
  return best;
}

}  // namespace godwit
