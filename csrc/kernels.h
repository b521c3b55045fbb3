// The whole native interface: what the machine offers and which instruction set is in use.
// Plain C++ and raw pointers; only bindings.cpp knows Python.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace godwit {

struct CpuFeature {
  const char* name;
  bool usable;  // the CPU has it and the operating system saves its registers
};

// Every feature this build knows to ask for on its architecture, present or not, in a fixed order.
const std::vector<CpuFeature>& cpu_features();

// From the plainest to the widest; a wider one implies all before it.
enum class InstructionSet { scalar, avx2, avx512 };

const char* name_of(InstructionSet set);

// Those that this CPU can run, from the plainest to the widest. Never empty: scalar always runs.
const std::vector<InstructionSet>& available_instruction_sets();

// The one that kernels use: the widest available until another is forced.
InstructionSet instruction_set();

// Throws std::invalid_argument where the name is unknown or the CPU lacks it; the choice then stays.
void set_instruction_set(std::string_view name);

// Logical cores this process may use: its affinity mask, cut down by the CPU quota of its cgroup (v2 and
// v1), a part of a core counting as a whole one. At least 1. `root` stands before /proc and /sys.
int num_cores(const std::string& root = "");

}  // namespace godwit
