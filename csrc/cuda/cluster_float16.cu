// SPDX-License-Identifier: Apache-2.0
#include "cuda/cluster.inl"

namespace frnn::cuda {

const Clusters kClustersFloat16 = {forward_in<Half<__half>>, backward_in<Half<__half>>};

}  // namespace frnn::cuda
