// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "numeric.h"

namespace frnn {

// Gates i f g o; states h c. c = s(f) c_prev + s(i) tanh(g), h = s(o) tanh(c).
// Saved: the activated gates.
struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4, kStates = 2, kSaved = 4;
  static constexpr bool kAdditive = true, kReadsH = false;

  template <class V>
  FRNN_FN static void forward(const V* gx, const V* gh, const V* s, V* out, V* saved) {
    const V i = sigmoid(V(gx[0] + gh[0]));
    const V f = sigmoid(V(gx[1] + gh[1]));
    const V g = tanh(V(gx[2] + gh[2]));
    const V o = sigmoid(V(gx[3] + gh[3]));
    const V c = f * s[1] + i * g;
    out[0] = o * tanh(c);
    out[1] = c;
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  // tanh(c) is recomputed: as a fifth saved plane it would cost more memory traffic than time.
  template <class V>
  FRNN_FN static void backward(const V* s, const V* saved, const V* dout, V* dgx, V* dgh, V* ds) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(V(f * s[1] + i * g));
    const V dc = dout[1] + dout[0] * o * (1.0f - tanh_c * tanh_c);
    dgx[0] = dgh[0] = dc * g * (i * (1.0f - i));
    dgx[1] = dgh[1] = dc * s[1] * (f * (1.0f - f));
    dgx[2] = dgh[2] = dc * i * (1.0f - g * g);
    dgx[3] = dgh[3] = dout[0] * tanh_c * (o * (1.0f - o));
    ds[1] = dc * f;
  }
};

}  // namespace frnn
