#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace godwit {
namespace {

// ---- CPU features ----------------------------------------------------------------------------------

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero if the CPU does not support the leaf or the subleaf. Leaf 7 reports its last subleaf in EAX.
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (subleaf > 0 && cpuid(leaf, 0).eax < subleaf) return r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

// XCR0: which register files the operating system saves. Inline assembly, since the intrinsic needs -mxsave.
uint64_t saved_register_files() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint32_t word, int index) { return ((word >> index) & 1U) != 0; }

// Intel SDM volume 2A (CPUID) and volume 1 chapter 13 (XCR0). For AMX this means that the kernel can save
// tiles; a process must still request them (may_use_tiles).
// macOS saves AVX-512 registers only from their first use on, so an Intel Mac shows no avx512 here.
std::vector<CpuFeature> detect_features() {
  const Registers l1 = cpuid(1, 0), l7 = cpuid(7, 0), l7_1 = cpuid(7, 1);
  const uint64_t saved = bit(l1.ecx, 27) ? saved_register_files() : 0;
  const auto saves = [saved](uint64_t mask) { return (saved & mask) == mask; };
  const bool ymm = saves(0x6), zmm = saves(0xe6), tiles = saves(0x60000);
  return {
      {"sse4.2", bit(l1.ecx, 20)},
      {"avx", ymm && bit(l1.ecx, 28)},
      {"f16c", ymm && bit(l1.ecx, 29)},
      {"fma", ymm && bit(l1.ecx, 12)},
      {"avx2", ymm && bit(l7.ebx, 5)},
      {"avx_vnni", ymm && bit(l7_1.eax, 4)},
      {"avx512f", zmm && bit(l7.ebx, 16)},
      {"avx512bw", zmm && bit(l7.ebx, 30)},
      {"avx512vl", zmm && bit(l7.ebx, 31)},
      {"avx512dq", zmm && bit(l7.ebx, 17)},
      {"avx512_vnni", zmm && bit(l7.ecx, 11)},
      {"avx512_vbmi", zmm && bit(l7.ecx, 1)},
      {"avx512_bf16", zmm && bit(l7_1.eax, 5)},
      {"avx512_fp16", zmm && bit(l7.edx, 23)},
      {"amx_tile", tiles && bit(l7.edx, 24)},
      {"amx_int8", tiles && bit(l7.edx, 25)},
      {"amx_bf16", tiles && bit(l7.edx, 22)},
  };
}

// Linux lets a process use tiles only after a request, which is for all its threads
// (Documentation/arch/x86/xstate.rst); it refuses if a thread's alternate signal stack is too small for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#elif defined(__aarch64__) && defined(__linux__)

// Bits of Documentation/arch/arm64/elf_hwcaps.rst, written out since older libc headers lack some names.
std::vector<CpuFeature> detect_features() {
  const unsigned long caps = getauxval(AT_HWCAP), caps2 = getauxval(AT_HWCAP2);
  return {
      {"neon", ((caps >> 1) & 1UL) != 0},
      {"dotprod", ((caps >> 20) & 1UL) != 0},
      {"i8mm", ((caps2 >> 13) & 1UL) != 0},
      {"bf16", ((caps2 >> 14) & 1UL) != 0},
  };
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool sysctl_flag(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

std::vector<CpuFeature> detect_features() {
  return {
      {"neon", true},
      {"dotprod", sysctl_flag("hw.optional.arm.FEAT_DotProd")},
      {"i8mm", sysctl_flag("hw.optional.arm.FEAT_I8MM")},
      {"bf16", sysctl_flag("hw.optional.arm.FEAT_BF16")},
  };
}

#else

std::vector<CpuFeature> detect_features() { return {}; }

#endif

// ---- The chosen instruction set --------------------------------------------------------------------

#if defined(__x86_64__)
bool has_all(std::initializer_list<std::string_view> names) {
  const auto& features = cpu_features();
  return std::all_of(names.begin(), names.end(), [&](std::string_view name) {
    return std::any_of(features.begin(), features.end(),
                       [&](const CpuFeature& f) { return name == f.name && f.usable; });
  });
}
#endif

std::vector<InstructionSet> detect_instruction_sets() {
  std::vector<InstructionSet> sets{InstructionSet::scalar};
#if defined(__x86_64__)
  if (!has_all({"avx2", "fma", "f16c"})) return sets;
  sets.push_back(InstructionSet::avx2);
  if (!has_all(
          {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_vbmi", "avx512_bf16"})) {
    return sets;
  }
  sets.push_back(InstructionSet::avx512);
  if (has_all({"amx_tile", "amx_int8", "amx_bf16"}) && may_use_tiles()) sets.push_back(InstructionSet::amx);
#endif
  return sets;
}

std::atomic<InstructionSet>& chosen() {
  static std::atomic<InstructionSet> set{available_instruction_sets().back()};
  return set;
}

std::string names(const std::vector<InstructionSet>& sets) {
  std::string text;
  for (const InstructionSet set : sets) text += (text.empty() ? "" : ", ") + std::string(name_of(set));
  return text;
}

// ---- Cores -----------------------------------------------------------------------------------------

int cores_of_affinity() {
#if defined(__linux__)
  // The kernel refuses a mask smaller than its own, so grow until it fits.
  for (int bits = 1024; bits <= 1 << 20; bits *= 4) {
    cpu_set_t* mask = CPU_ALLOC(bits);
    if (mask == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(bits);
    const int count = sched_getaffinity(0, size, mask) == 0 ? CPU_COUNT_S(size, mask) : 0;
    CPU_FREE(mask);
    if (count > 0) return count;
  }
#endif
  return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}

std::optional<double> quota_over_period(const std::string& quota, const std::string& period) {
  try {
    const double q = std::stod(quota), p = std::stod(period);
    if (q > 0 && p > 0) return q / p;
  } catch (const std::exception&) {  // "max": no limit
  }
  return std::nullopt;
}

std::string first_line(const std::string& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

// Cores allowed by one cgroup directory: "quota period" in v2's "cpu.max", or a file for each in v1.
std::optional<double> quota_of(const std::string& directory) {
  std::istringstream both(first_line(directory + "/cpu.max"));
  std::string quota, period;
  if (both >> quota >> period) return quota_over_period(quota, period);
  return quota_over_period(first_line(directory + "/cpu.cfs_quota_us"),
                           first_line(directory + "/cpu.cfs_period_us"));
}

// The lowest quota from a cgroup up to the mount point, since a parent's limit applies to its children. In a
// container the path may be a directory of the host that does not exist here; then only its parents are
// tried.
double tightest_quota(const std::string& mount, std::string path) {
  double cores = 1e9;
  while (true) {
    if (const auto quota = quota_of(mount + path)) cores = std::min(cores, *quota);
    const size_t slash = path.rfind('/');
    if (path.empty() || slash == std::string::npos) return cores;
    path.resize(slash);
  }
}

// Lines of /proc/self/cgroup read "id:controllers:/path"; v2 has id 0 and no controllers.
double cores_of_cgroup(const std::string& root) {
  double cores = 1e9;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = line.substr(first, second - first + 1);
    controllers.front() = controllers.back() = ',';
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") {
      cores = std::min(cores, tightest_quota(root + "/sys/fs/cgroup", path));
    } else if (controllers.find(",cpu,") != std::string::npos) {
      cores = std::min(cores, tightest_quota(root + "/sys/fs/cgroup/cpu", path));
    }
  }
  return cores;
}

}  // namespace

const std::vector<CpuFeature>& cpu_features() {
  static const std::vector<CpuFeature> features = detect_features();
  return features;
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::amx:
      return "amx";
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    case InstructionSet::scalar:
      break;
  }
  return "scalar";
}

const std::vector<InstructionSet>& available_instruction_sets() {
  static const std::vector<InstructionSet> sets = detect_instruction_sets();
  return sets;
}

InstructionSet instruction_set() { return chosen().load(); }

void set_instruction_set(std::string_view name) {
  for (const InstructionSet set :
       {InstructionSet::scalar, InstructionSet::avx2, InstructionSet::avx512, InstructionSet::amx}) {
    if (name != name_of(set)) continue;
    const auto& sets = available_instruction_sets();
    if (std::find(sets.begin(), sets.end(), set) != sets.end()) {
      chosen().store(set);
      return;
    }
    throw std::invalid_argument("This CPU cannot run the instruction set '" + std::string(name) +
                                "'; it offers: " + names(sets) + ".");
  }
  throw std::invalid_argument("There is no instruction set named '" + std::string(name) +
                              "'; this CPU offers: " + names(available_instruction_sets()) + ".");
}

const KernelTable& kernels() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::amx:
      return kAmxTable;
    case InstructionSet::avx512:
      return kAvx512Table;
    case InstructionSet::avx2:
      return kAvx2Table;
#endif
    default:
      return kScalarTable;
  }
}

int num_cores(const std::string& root) {
  const double quota = std::max(1.0, cores_of_cgroup(root));
  const int cores = cores_of_affinity();
  return quota >= cores ? cores : static_cast<int>(std::ceil(quota));
}

}  // namespace godwit
