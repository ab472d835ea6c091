// SPDX-License-Identifier: Apache-2.0
// The simulator for pytest. Bindings of the real kernels belong here.
#include <pybind11/pybind11.h>

#include "checks.h"
#include "sim.h"
#include "toys.h"

PYBIND11_MODULE(cuda_sim, m) {
  using namespace frnn;
  using namespace pybind11::literals;
  m.def("set_seed", &sim::set_seed, "Later launches are a function of this seed.");
  m.def("set_script", &sim::set_script, "pause"_a = "", "block"_a = 0, "warp"_a = -1,
        "late"_a = -1);
  pybind11::list names;
  for (const char* name : checks::kNames) names.append(name);
  m.attr("CHECKS") = names;
  m.def(
      "run_check", [](int check) { checks::run(check); },
      "Raises RuntimeError if a primitive is wrong.");
  m.def(
      "run_toy",
      [](int toy, int bug) {
        toys::run_toy(static_cast<toys::Toy>(toy), static_cast<toys::Bug>(bug));
      },
      "Raises RuntimeError with a sentence if the run fails.");
}
