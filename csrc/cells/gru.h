// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "numeric.h"

namespace frnn {

// Gates r z n, the reset gate after the product: n = tanh(gx_n + r gh_n), h = (1 - z) n + z h_prev.
// Saved: r, z, n and gh_n.
struct Gru {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3, kStates = 1, kSaved = 4, kParams = 0;
  static constexpr bool kAdditive = false, kReadsH = true;

  template <class V>
  FRNN_FN static void forward(const V* gx, const V* gh, const V* s, const V*, V* out, V* saved) {
    const V r = sigmoid(V(gx[0] + gh[0]));
    const V z = sigmoid(V(gx[1] + gh[1]));
    const V n = tanh(V(gx[2] + r * gh[2]));
    out[0] = (1.0f - z) * n + z * s[0];
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = gh[2];
  }

  template <class V>
  FRNN_FN static void backward(const V* s, const V* saved, const V*, const V* dout, V* dgx, V* dgh,
                               V* ds, V*) {
    const V r = saved[0], z = saved[1], n = saved[2];
    const V dn = dout[0] * (1.0f - z) * (1.0f - n * n);
    dgx[0] = dgh[0] = dn * saved[3] * (r * (1.0f - r));
    dgx[1] = dgh[1] = dout[0] * (s[0] - n) * (z * (1.0f - z));
    dgx[2] = dn;
    dgh[2] = dn * r;
    ds[0] = dout[0] * z;
  }
};

// The same with the reset gate before the product: the gate n is late, and r is its factor.
// Saved: r, z and n.
struct GruResetBefore {
  static constexpr const char* kName = "gru_reset_before";
  static constexpr int kGates = 3, kStates = 1, kSaved = 3, kParams = 0;
  static constexpr bool kAdditive = true, kReadsH = true;
  static constexpr int kLate = 1;

  template <class V>
  FRNN_FN static V factor(const V* gx, const V* gh) {
    return sigmoid(V(gx[0] + gh[0]));
  }

  template <class V>
  FRNN_FN static void forward(const V* gx, const V* gh, const V* s, const V*, V* out, V* saved) {
    const V z = sigmoid(V(gx[1] + gh[1]));
    const V n = tanh(V(gx[2] + gh[2]));
    out[0] = (1.0f - z) * n + z * s[0];
    saved[0] = factor(gx, gh);
    saved[1] = z;
    saved[2] = n;
  }

  template <class V>
  FRNN_FN static void backward(const V* s, const V* saved, const V*, const V* dout, V* dgx, V* dgh,
                               V* ds, V*) {
    const V z = saved[1], n = saved[2];
    dgx[0] = V{};
    dgx[1] = dout[0] * (s[0] - n) * (z * (1.0f - z));
    dgx[2] = dout[0] * (1.0f - z) * (1.0f - n * n);
    for (int g = 0; g < kGates; ++g) dgh[g] = dgx[g];
    ds[0] = dout[0] * z;
  }

  // The gradient of the factor times h is d: that of the first gate, and the share of h.
  template <class V>
  FRNN_FN static V backward_of_factor(V h, const V* saved, V d, V* dh) {
    const V r = saved[0];
    *dh = d * r;
    return d * h * (r * (1.0f - r));
  }
};

}  // namespace frnn
