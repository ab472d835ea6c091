// SPDX-License-Identifier: Apache-2.0
#include "cuda/standard.inl"

namespace frnn::cuda {

const Standard kStandardFloat64 = {forward_in<Fp64>, backward_in<Fp64>};

}  // namespace frnn::cuda
