// SPDX-License-Identifier: Apache-2.0
#include "cuda/grid.inl"

namespace frnn::cuda {

const Grids kGridsFloat16 = {forward_in<Half<__half>>, backward_in<Half<__half>>};

}  // namespace frnn::cuda
