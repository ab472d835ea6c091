// SPDX-License-Identifier: Apache-2.0
// The choice of the algorithm.
#include "cuda/driver.h"
#include "cuda/primitives.h"

namespace frnn::cuda {
namespace {

// In the order of Arithmetic.
constexpr const Standard* kStandard[] = {&kStandardFloat16, &kStandardBfloat16, &kStandardTf32,
                                         &kStandardFloat32, &kStandardFloat64};
constexpr const Clusters* kClusters[] = {&kClustersFloat16, &kClustersBfloat16, &kClustersTf32};

template <class Args>
ClusterShape shape_for(int cell, Arithmetic arithmetic, bool backward, const Args& args) {
  if (args.w_hr || args.t == 0) return {};
  return cluster_shape(args.b, args.h, cell_facts(cell).gates, arithmetic, backward,
                       current_device());
}

}  // namespace

void forward(int cell, Arithmetic arithmetic, const Forward<void, void>& args, void* stream) {
  if (args.b == 0) return;
  const int index = static_cast<int>(arithmetic);
  const ClusterShape shape = shape_for(cell, arithmetic, false, args);
  if (shape.blocks > 0 && kClusters[index]->forward(cell, args, shape, stream)) return;
  kStandard[index]->forward(cell, args, stream);
}

void backward(int cell, Arithmetic arithmetic, const Backward<void, void>& args, void* stream) {
  if (args.b == 0) return;
  const int index = static_cast<int>(arithmetic);
  const ClusterShape shape = shape_for(cell, arithmetic, true, args);
  if (shape.blocks > 0 && kClusters[index]->backward(cell, args, shape, stream)) return;
  kStandard[index]->backward(cell, args, stream);
}

}  // namespace frnn::cuda
