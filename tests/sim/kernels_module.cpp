// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/cuda on the simulator, for pytest. Arrays come as address and
// bytes by the names of the C++ interface, address 0 for null.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/driver.h"
#include "cuda/primitives.h"
#include "guards.h"
#include "sim.h"

namespace {

using namespace frnn::cuda;
using Arrays = std::map<std::string, std::pair<uintptr_t, size_t>>;  // of a side

struct Pointers {
  const Arrays& arrays;
  frnn::sim::Guards& guards;

  template <class T>
  void set(const char* name, T*& p) const {
    const auto [address, bytes] = arrays.at(name);
    void* array = reinterpret_cast<void*>(address);
    p = static_cast<T*>(array == nullptr ? nullptr : guards.add(name, array, bytes));
  }
};

template <class Args>
void set_sequence(Args& args, int64_t t, int64_t b, int64_t h, int64_t p, bool reverse,
                  const Pointers& from) {
  args.t = t;
  args.b = b;
  args.h = h;
  args.p = p;
  args.reverse = reverse;
  from.set("w_hh", args.w_hh);
  from.set("w_hr", args.w_hr);
  from.set("lengths", args.lengths);
  from.set("resets", args.resets);
}

// Whether calls that the grid algorithm can run do run by it, even where the cluster algorithm
// would be chosen.
bool prefers_grid = false;

template <class Args>
void run(int cell, Arithmetic arithmetic, Sides<Args>& sides, frnn::sim::Guards& guards) {
  constexpr bool kBackward = std::is_same_v<Args, Backward<void, void>>;
  constexpr const Grids* kGrids[] = {&kGridsFloat16, &kGridsBfloat16, &kGridsTf32};
  const Args& args = sides.of[0];
  const Call call{args.b,
                  args.h,
                  args.p,
                  frnn::cell_facts(cell).gates,
                  arithmetic,
                  kBackward,
                  args.w_hr != nullptr,
                  sides.count};
  const GridShape grid = grid_shape(call, simulated_device);
  const bool forced = prefers_grid && grid.teams > 0 && !call.projection;
  const auto exchange_bytes = [&] {
    if constexpr (kBackward) return backward_exchange_bytes(cell, arithmetic, sides);
    if constexpr (!kBackward) return forward_exchange_bytes(cell, arithmetic, sides);
  };
  std::vector<unsigned char> exchange(forced ? grid.exchange : exchange_bytes());
  if (!exchange.empty()) {
    sides.exchange = guards.add("exchange", exchange.data(), exchange.size());
  }
  uint32_t words[3] = {};
  frnn::sim::overlapping([&] {
    const Grids& grids = *kGrids[forced ? static_cast<int>(arithmetic) : 0];
    if constexpr (kBackward) {
      if (!forced) return backward(cell, arithmetic, sides, nullptr);
      grids.backward(cell, sides, grid, words, nullptr);
    } else {
      if (!forced) return forward(cell, arithmetic, sides, nullptr);
      grids.forward(cell, sides, grid, words, nullptr);
    }
  });
  guards.copy_back();
}

#define SET(name) from.set(#name, args.name)

void run_forward(int cell, int arithmetic, int64_t t, int64_t b, int64_t h, int64_t p, bool reverse,
                 const std::vector<Arrays>& of_sides) {
  frnn::sim::Guards guards;
  ForwardSides sides{};
  for (const Arrays& arrays : of_sides) {
    const Pointers from{arrays, guards};
    Forward<void, void>& args = sides.of[sides.count];
    set_sequence(args, t, b, h, p, reverse != (sides.count++ > 0), from);
    SET(gx), SET(b_hh), SET(h0), SET(c0), SET(y), SET(h_n), SET(c_n), SET(c);
    SET(h_prev), SET(c_prev), SET(saved), SET(m), SET(h_step), SET(states_step), SET(m_step);
  }
  run(cell, static_cast<Arithmetic>(arithmetic), sides, guards);
}

void run_backward(int cell, int arithmetic, int64_t t, int64_t b, int64_t h, int64_t p,
                  bool reverse, const std::vector<Arrays>& of_sides) {
  frnn::sim::Guards guards;
  BackwardSides sides{};
  for (const Arrays& arrays : of_sides) {
    const Pointers from{arrays, guards};
    Backward<void, void>& args = sides.of[sides.count];
    set_sequence(args, t, b, h, p, reverse != (sides.count++ > 0), from);
    SET(dy), SET(dc), SET(dh_n), SET(dc_n), SET(h_prev), SET(c_prev), SET(saved);
    SET(dgx), SET(dgh), SET(dh0), SET(dc0), SET(dh), SET(w_hh_t), SET(w_hr_t);
  }
  run(cell, static_cast<Arithmetic>(arithmetic), sides, guards);
}

#undef SET

}  // namespace

PYBIND11_MODULE(cuda_kernels_sim, m) {
  using namespace pybind11::literals;
  m.def("set_seed", &frnn::sim::set_seed);
  m.def("set_script", &frnn::sim::set_script, "pause"_a = "", "block"_a = 0, "warp"_a = -1,
        "late"_a = -1);
  m.def("lose_a_block", [](bool lose) { loses_a_block = lose; });
  m.def("launched", &frnn::sim::launched);
  m.def("products", &frnn::sim::products);
  m.def("set_device", [](int multiprocessors, int capability, bool waits, bool grid) {
    simulated_device = {multiprocessors, capability, 227 * 1024, waits};
    prefers_grid = grid;
  });
  m.def("forward", &run_forward);
  m.def("backward", &run_backward);
}
