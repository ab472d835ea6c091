// SPDX-License-Identifier: Apache-2.0
// A float whose sigmoid and tanh are made of the GPU's own approximations, for arithmetics whose
// products or storage are much coarser.
#pragma once

#include "cuda/primitives.h"
#include "numeric.h"

namespace frnn {
namespace cuda {

struct Approximate {
  float x;

  Approximate() = default;
  FRNN_FN Approximate(float v) : x(v) {}
  FRNN_FN operator float() const { return x; }
  FRNN_FN Approximate& operator+=(float v) {
    x += v;
    return *this;
  }
};

// Within 2^-22 of 1 / (1 + e^-x): three instructions of about that error each.
FRNN_FN Approximate sigmoid(Approximate v) {
#if defined(__CUDA_ARCH__) || defined(FRNN_SIM)
  return reciprocal_approx(1.0f + exp2_approx(-1.44269504f * v.x));
#else
  return frnn::sigmoid(v.x);
#endif
}

// Within 2^-21: the error is an absolute one, near 0 too.
FRNN_FN Approximate tanh(Approximate v) { return 1.0f - 2.0f * sigmoid(-2.0f * v.x).x; }

}  // namespace cuda

template <>
struct Value<cuda::Approximate> {
  using Scalar = cuda::Approximate;  // its memory is of other types
  static constexpr int kLanes = 1;
};

}  // namespace frnn
