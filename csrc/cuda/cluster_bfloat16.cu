// SPDX-License-Identifier: Apache-2.0
#include "cuda/cluster.inl"

namespace frnn::cuda {

const Clusters kClustersBfloat16 = {forward_in<Half<__nv_bfloat16>>,
                                    backward_in<Half<__nv_bfloat16>>};

}  // namespace frnn::cuda
