// SPDX-License-Identifier: Apache-2.0
#include "cuda/grid.inl"

namespace frnn::cuda {

const Grids kGridsTf32 = {forward_in<Tf32>, backward_in<Tf32>};

}  // namespace frnn::cuda
