// SPDX-License-Identifier: Apache-2.0
// The standard algorithm of csrc/cuda on the simulator, for pytest. Arrays come as addresses by the
// names of the C++ interface, 0 for null.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cuda/standard.h"
#include "sim.h"

namespace {

using namespace frnn::cuda;
using Arrays = std::map<std::string, uintptr_t>;

struct Pointers {
  const Arrays& arrays;

  template <class T>
  void set(const char* name, T*& p) const {
    p = reinterpret_cast<T*>(arrays.at(name));
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

#define SET(name) from.set(#name, args.name)

void run_forward(int cell, int arithmetic, int64_t t, int64_t b, int64_t h, int64_t p, bool reverse,
                 const Arrays& arrays) {
  const Pointers from{arrays};
  Forward<void, void> args{};
  set_sequence(args, t, b, h, p, reverse, from);
  SET(gx), SET(b_hh), SET(h0), SET(c0), SET(y), SET(h_n), SET(c_n), SET(c);
  SET(h_prev), SET(c_prev), SET(saved), SET(m), SET(h_step), SET(states_step), SET(m_step);
  frnn::sim::overlapping(
      [&] { forward(cell, static_cast<Arithmetic>(arithmetic), args, nullptr); });
}

void run_backward(int cell, int arithmetic, int64_t t, int64_t b, int64_t h, int64_t p,
                  bool reverse, const Arrays& arrays) {
  const Pointers from{arrays};
  Backward<void, void> args{};
  set_sequence(args, t, b, h, p, reverse, from);
  SET(dy), SET(dc), SET(dh_n), SET(dc_n), SET(h_prev), SET(c_prev), SET(saved);
  SET(dgx), SET(dgh), SET(dh0), SET(dc0), SET(dh), SET(w_hh_t), SET(w_hr_t);
  frnn::sim::overlapping(
      [&] { backward(cell, static_cast<Arithmetic>(arithmetic), args, nullptr); });
}

#undef SET

}  // namespace

PYBIND11_MODULE(cuda_standard_sim, m) {
  m.def("set_seed", &frnn::sim::set_seed);
  m.def("forward", &run_forward);
  m.def("backward", &run_backward);
}
