// SPDX-License-Identifier: Apache-2.0
#include "cuda/standard.inl"

namespace frnn::cuda {

const Standard kStandardTf32 = {forward_in<Tf32>, backward_in<Tf32>};

}  // namespace frnn::cuda
