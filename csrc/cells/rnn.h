// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "numeric.h"

namespace frnn {

// The Elman cell, h = act(gx + gh). Saved: h.
struct RnnTanh {
  static constexpr const char* kName = "rnn_tanh";
  static constexpr int kGates = 1, kStates = 1, kSaved = 1, kParams = 0;
  static constexpr bool kAdditive = true, kReadsH = false;

  template <class V>
  FRNN_FN static void forward(const V* gx, const V* gh, const V*, const V*, V* out, V* saved) {
    out[0] = saved[0] = tanh(V(gx[0] + gh[0]));
  }

  template <class V>
  FRNN_FN static void backward(const V*, const V* saved, const V*, const V* dout, V* dgx, V* dgh,
                               V*, V*) {
    dgx[0] = dgh[0] = dout[0] * (1.0f - saved[0] * saved[0]);
  }
};

struct RnnRelu {
  static constexpr const char* kName = "rnn_relu";
  static constexpr int kGates = 1, kStates = 1, kSaved = 1, kParams = 0;
  static constexpr bool kAdditive = true, kReadsH = false;

  // Both comparisons are false for NaN, which therefore passes, as it does through torch.relu.
  template <class V>
  FRNN_FN static void forward(const V* gx, const V* gh, const V*, const V*, V* out, V* saved) {
    const V x = gx[0] + gh[0];
    out[0] = saved[0] = x <= 0.0f ? V{} : x;
  }

  template <class V>
  FRNN_FN static void backward(const V*, const V* saved, const V*, const V* dout, V* dgx, V* dgh,
                               V*, V*) {
    dgx[0] = dgh[0] = saved[0] <= 0.0f ? V{} : dout[0];
  }
};

}  // namespace frnn
