// SPDX-License-Identifier: Apache-2.0
#include "cuda/standard.inl"

namespace frnn::cuda {

const Standard kStandardFloat32 = {forward_in<Fp32>, backward_in<Fp32>};

}  // namespace frnn::cuda
