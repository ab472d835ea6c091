// SPDX-License-Identifier: Apache-2.0
// The contract of a cell, and the list of all cells. Everything else in csrc/ is generic over it.
//
// A cell is a struct of static functions over a value type V (numeric.h), acting on one hidden
// unit (or one vector of units) of one batch row. States are h first, then the others.
//
//   forward(gx[G], gh[G], s[S], p[K], out[S], saved[R])
//       gx = W_ih x + b_ih, gh = W_hh h_prev (+ b_hh); s: the states that enter the step; p: the
//       unit's parameters beside the weights; out: the new states; saved: all that backward needs
//       beside s and p.
//   backward(s[S], saved[R], p[K], dout[S], dgx[G], dgh[G], ds[S], dp[K])
//       ds[0] is only the path from h_prev to out that does not pass through W_hh; a cell with
//       kReadsH = false has none and leaves ds[0] alone. dp: what this step adds to the gradients
//       of p.
//
// A cell with a constant kLate, additive and with h alone as its state, has as many late gates, the
// last ones. In their product factor(gx, gh) times h stands for h, made of the first gate; backward
// leaves the gradient of that gate to backward_of_factor, once theirs have gone back through it.
//
// A cell with a constant kOutput has the states h = saved[kOutput] tanh(c) and c, so that c can be
// normalised in between, and a function backward_of_gates for that.
#pragma once

#include <concepts>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

namespace frnn {

template <class C>
concept CellPolicy = requires(const double* in, double* out) {
  { C::kName } -> std::convertible_to<const char*>;
  { C::kGates } -> std::convertible_to<int>;      // G
  { C::kStates } -> std::convertible_to<int>;     // S
  { C::kSaved } -> std::convertible_to<int>;      // R
  { C::kParams } -> std::convertible_to<int>;     // K, may be 0
  { C::kAdditive } -> std::convertible_to<bool>;  // gx and gh only meet as gx + gh: dgx == dgh
  { C::kReadsH } -> std::convertible_to<bool>;    // forward reads s[0]; excludes a projection
  C::template forward<double>(in, in, in, in, out, out);
  C::template backward<double>(in, in, in, in, out, out, out, out);
} && C::kGates >= 1 && C::kStates >= 1 && C::kSaved >= 1;

template <class C>
concept NormalisesState = requires { C::kOutput; };

template <class C>
constexpr int kLateGates = 0;
template <class C>
  requires requires { C::kLate; }
constexpr int kLateGates<C> = C::kLate;

template <CellPolicy... C>
struct CellList {
  static constexpr int kCount = sizeof...(C);
  template <CellPolicy... More>
  using With = CellList<C..., More...>;

  // Calls f.template operator()<Cell>() for the cell with this index; false if there is none.
  template <class F>
  static bool dispatch(int cell, F f) {
    int index = 0;
    return ((index++ == cell ? (f.template operator()<C>(), true) : false) || ...);
  }
};

// The order is the public cell index. Those of torch.nn come first: the CUDA kernels are made for
// them alone.
using PlainCells = CellList<RnnTanh, RnnRelu, Lstm, Gru>;
using Cells = PlainCells::With<LstmPeephole, LstmCoupled, LstmCoupledPeephole, GruResetBefore>;

}  // namespace frnn
