// SPDX-License-Identifier: Apache-2.0
// The choice of the driver.
#include "cuda/driver.h"

namespace frnn::cuda {
namespace {

// In the order of Arithmetic.
constexpr const Driver* kDrivers[] = {&kStandardFloat16, &kStandardBfloat16, &kStandardTf32,
                                      &kStandardFloat32, &kStandardFloat64};

const Driver& driver(Arithmetic arithmetic) { return *kDrivers[static_cast<int>(arithmetic)]; }

}  // namespace

void forward(int cell, Arithmetic arithmetic, const Forward<void, void>& args, void* stream) {
  if (args.b > 0) driver(arithmetic).forward(cell, args, stream);
}

void backward(int cell, Arithmetic arithmetic, const Backward<void, void>& args, void* stream) {
  if (args.b > 0) driver(arithmetic).backward(cell, args, stream);
}

}  // namespace frnn::cuda
