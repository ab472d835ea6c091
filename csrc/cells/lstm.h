// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "numeric.h"

namespace frnn {

// Gates i f g o; states h c. c = s(f) c_prev + s(i) tanh(g), h = s(o) tanh(c).
// Coupled: there is no gate i, and 1 - s(f) stands for s(i). Peephole: i += p_i c_prev,
// f += p_f c_prev, o += p_o c before the sigmoids, with p in this order, without p_i if coupled.
// Saved: the activated gates.
template <bool kCoupled, bool kPeephole>
struct LstmCell {
  static constexpr const char* kName = kCoupled
                                           ? (kPeephole ? "lstm_coupled_peephole" : "lstm_coupled")
                                           : (kPeephole ? "lstm_peephole" : "lstm");
  static constexpr int kGates = kCoupled ? 3 : 4, kStates = 2, kSaved = kGates;
  static constexpr int kParams = kPeephole ? kGates - 1 : 0;
  static constexpr bool kAdditive = true, kReadsH = false;

  template <class V>
  FRNN_FN static void forward(const V* gx, const V* gh, const V* s, const V* p, V* out, V* saved) {
    V gates[kGates];
    for (int k = 0; k < kGates; ++k) gates[k] = gx[k] + gh[k];
    if constexpr (kPeephole) {
      for (int k = kI; k <= kF; ++k) gates[k] += p[k] * s[1];
    }
    for (int k = kI; k <= kF; ++k) saved[k] = sigmoid(gates[k]);
    saved[kG] = tanh(gates[kG]);
    const V c = new_c(s, saved);
    if constexpr (kPeephole) gates[kO] += p[kPO] * c;
    saved[kO] = sigmoid(gates[kO]);
    out[0] = saved[kO] * tanh(c);
    out[1] = c;
  }

  // tanh(c) is recomputed: as another saved plane it would cost more memory traffic than time.
  template <class V>
  FRNN_FN static void backward(const V* s, const V* saved, const V* p, const V* dout, V* dgx,
                               V* dgh, V* ds, V* dp) {
    const V tanh_c = tanh(new_c(s, saved));
    const V dc = dout[1] + dout[0] * saved[kO] * (1.0f - tanh_c * tanh_c);
    backward_of_gates(s, saved, p, V(dout[0] * tanh_c), dc, dgx, dgh, ds, dp);
  }

  // The rest, for a driver that normalises c on its way into h = saved[kOutput] tanh(c): from the
  // gradients of that plane and of c.
  static constexpr int kOutput = kCoupled ? 2 : 3;
  template <class V>
  FRNN_FN static void backward_of_gates(const V* s, const V* saved, const V* p, V d_o, V dc, V* dgx,
                                        V* dgh, V* ds, V* dp) {
    const V f = saved[kF], g = saved[kG], o = saved[kO];
    const V i = kCoupled ? V(1.0f - f) : saved[kI];
    dgx[kO] = d_o * (o * (1.0f - o));
    if constexpr (kPeephole) dc += dgx[kO] * p[kPO];
    if constexpr (kCoupled) {
      dgx[kF] = dc * (s[1] - g) * (f * i);
    } else {
      dgx[kI] = dc * g * (i * (1.0f - i));
      dgx[kF] = dc * s[1] * (f * (1.0f - f));
    }
    dgx[kG] = dc * i * (1.0f - g * g);
    for (int k = 0; k < kGates; ++k) dgh[k] = dgx[k];
    ds[1] = dc * f;
    if constexpr (kPeephole) {
      for (int k = kI; k <= kF; ++k) {
        ds[1] += dgx[k] * p[k];
        dp[k] = dgx[k] * s[1];
      }
      dp[kPO] = dgx[kO] * new_c(s, saved);
    }
  }

 private:
  // The places of the gates; i and f are the same if coupled, and those before g see c_prev.
  static constexpr int kI = 0, kF = kCoupled ? 0 : 1, kG = kF + 1, kO = kF + 2;
  static constexpr int kPO = kF + 1;  // of p_o

  template <class V>
  FRNN_FN static V new_c(const V* s, const V* saved) {
    const V f = saved[kF];
    return f * s[1] + (kCoupled ? V(1.0f - f) : saved[kI]) * saved[kG];
  }
};

using Lstm = LstmCell<false, false>;
using LstmPeephole = LstmCell<false, true>;
using LstmCoupled = LstmCell<true, false>;
using LstmCoupledPeephole = LstmCell<true, true>;

}  // namespace frnn
