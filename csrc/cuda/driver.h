// SPDX-License-Identifier: Apache-2.0
// One driver per arithmetic: the same text (standard.inl) with other products.
#pragma once

#include "cuda/standard.h"

namespace frnn::cuda {

struct Driver {
  void (*forward)(int cell, const Forward<void, void>& args, void* stream);
  void (*backward)(int cell, const Backward<void, void>& args, void* stream);
};

extern const Driver kStandardFloat16;
extern const Driver kStandardBfloat16;
extern const Driver kStandardTf32;
extern const Driver kStandardFloat32;
extern const Driver kStandardFloat64;

}  // namespace frnn::cuda
