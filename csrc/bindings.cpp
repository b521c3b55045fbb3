#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_native, m) {
  m.doc() = "What the CPU offers and which instruction set the native kernels use.";

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
