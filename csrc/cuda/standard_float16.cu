// SPDX-License-Identifier: Apache-2.0
#include "cuda/standard.inl"

namespace frnn::cuda {

const Standard kStandardFloat16 = {forward_in<Half<__half>>, backward_in<Half<__half>>};

}  // namespace frnn::cuda
