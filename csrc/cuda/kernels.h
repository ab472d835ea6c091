// SPDX-License-Identifier: Apache-2.0
// The C++ interface of the CUDA kernels. Arrays are those of recurrence.h, on one device; pointers
// are untyped (S = A = void) and take their types from the arithmetic.
#pragma once

#include "cuda/plan.h"
#include "recurrence.h"

namespace frnn::cuda {

// The input projection is the caller's: x, w_ih and b_ih are not read; gx holds b_hh too if the
// cell is additive.
template <class S, class A>
struct Forward : ForwardArgs<S, A> {
  const S* gx;  // [T, B, G*H] in: W_ih x and its biases

  // Between steps, contents unspecified, or null if h_prev is given.
  S* h_step;       // [2, B, P]
  A* states_step;  // [S-1, B, H]
  S* m_step;       // [B, H], or null if m is given or there is no projection

  int copied;  // set by the driver: bytes at a time in which products copy their rows, see
               // product()
};

template <class S, class A>
struct Backward : BackwardArgs<S, A> {
  S* dgx;  // [T, B, G*H], [T, B, G*H] and [T, B, P] out: the StepGradients of all steps
  S* dgh;
  S* dh;

  const S* w_hh_t;  // [P, G*H] in: w_hh transposed
  const S* w_hr_t;  // [H, P] in: w_hr transposed, or null

  int copied;  // as in Forward
};

// One direction of a layer, or both: of the same sizes, with the same lengths and resets or none.
template <class Args>
struct Sides {
  Args of[2];
  int count;
  void* exchange = nullptr;  // as many bytes as *_exchange_bytes says, or null if that is 0
};

using ForwardSides = Sides<Forward<void, void>>;
using BackwardSides = Sides<Backward<void, void>>;

// How many bytes forward needs for what its blocks send each other, on the current device; only
// sizes and w_hr are read.
int64_t forward_exchange_bytes(int cell, Arithmetic arithmetic, const ForwardSides& sides);
int64_t backward_exchange_bytes(int cell, Arithmetic arithmetic, const BackwardSides& sides);

// Queue the kernels on a cudaStream_t of the current device: both directions side by side where
// there is room for them, else one after the other. A launch that fails throws std::runtime_error.
void forward(int cell, Arithmetic arithmetic, const ForwardSides& sides, void* stream);
void backward(int cell, Arithmetic arithmetic, const BackwardSides& sides, void* stream);

}  // namespace frnn::cuda
