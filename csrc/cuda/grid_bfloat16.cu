// SPDX-License-Identifier: Apache-2.0
#include "cuda/grid.inl"

namespace frnn::cuda {

const Grids kGridsBfloat16 = {forward_in<Half<__nv_bfloat16>>, backward_in<Half<__nv_bfloat16>>};

}  // namespace frnn::cuda
