// SPDX-License-Identifier: Apache-2.0
#include "cuda/cluster.inl"

namespace frnn::cuda {

const Clusters kClustersTf32 = {forward_in<Tf32>, backward_in<Tf32>};

}  // namespace frnn::cuda
