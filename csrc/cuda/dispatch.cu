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

// Runs a call by the algorithm that suits it, or by the standard one if the device cannot hold what
// that needs.
template <class Args, class Run>
void run(int cell, Arithmetic arithmetic, bool backward, const Args& args, const Run& by) {
  const Call call{
      args.b, args.h, args.p, cell_facts(cell).gates, arithmetic, backward, args.w_hr != nullptr};
  const Choice choice = choose(call, current_device());
  const int index = static_cast<int>(arithmetic);
  if (choice.algorithm == Algorithm::kCluster && args.t > 0 &&
      by(*kClusters[index], choice.cluster)) {
    return;
  }
  by(*kStandard[index]);
}

}  // namespace

void forward(int cell, Arithmetic arithmetic, const Forward<void, void>& args, void* stream) {
  if (args.b == 0) return;
  run(cell, arithmetic, false, args, [&](const auto& driver, const auto&... shape) {
    return driver.forward(cell, args, shape..., stream);
  });
}

void backward(int cell, Arithmetic arithmetic, const Backward<void, void>& args, void* stream) {
  if (args.b == 0) return;
  run(cell, arithmetic, true, args, [&](const auto& driver, const auto&... shape) {
    return driver.backward(cell, args, shape..., stream);
  });
}

}  // namespace frnn::cuda
