// SPDX-License-Identifier: Apache-2.0
// The launches of the cluster algorithm.
#include "cuda/cluster.cuh"
#include "cuda/driver.h"

namespace frnn::cuda {
namespace {

// Calls f.template operator()<kBlocks, kTiles>() for a shape.
template <class F>
bool with_shape(const ClusterShape& shape, const F& f) {
  if (shape.blocks == 1) return f.template operator()<1, 1>();
  return shape.tiles == 1 ? f.template operator()<kClusterBlocks, 1>()
                          : f.template operator()<kClusterBlocks, 2>();
}

template <class Args>
bool run_clusters(const char* name, void (*kernel)(Sides<Args>, ClusterShape),
                  const Sides<Args>& sides, const ClusterShape& shape, void* stream) {
  const Launch how{.grid = dim3(static_cast<unsigned>(sides.count * shape.clusters * shape.blocks)),
                   .block = dim3(static_cast<unsigned>(shape.warps * kWarpSize)),
                   .cluster = shape.blocks,
                   .smem = static_cast<size_t>(shape.bytes),
                   .stream = static_cast<cudaStream_t>(stream)};
  allow_shared_memory(name, kernel, current_device().shared_memory);
  if (shape.blocks > 1 && resident_clusters(name, kernel, how) == 0) return false;
  launch(name, kernel, how, sides, shape);
  return true;
}

template <class M>
bool forward_in(int cell, const ForwardSides& sides, const ClusterShape& shape, void* stream) {
  bool ran = false;
  with_types<M>(cell, sides, [&]<class Cell>(auto typed) {
    for (auto& f : typed.of)
      f.copied = common_unit({f.h * int64_t{sizeof(typename M::S)}}, {f.w_hh});
    ran = with_shape(shape, [&]<int kBlocks, int kTiles>() {
      return run_clusters("forward_cluster", forward_cluster<Cell, M, kBlocks, kTiles>, typed,
                          shape, stream);
    });
  });
  return ran;
}

template <class M>
bool backward_in(int cell, const BackwardSides& sides, const ClusterShape& shape, void* stream) {
  bool ran = false;
  with_types<M>(cell, sides, [&]<class Cell>(auto typed) {
    for (auto& f : typed.of)
      f.copied = common_unit({f.h * int64_t{sizeof(typename M::S)}}, {f.w_hh_t});
    ran = with_shape(shape, [&]<int kBlocks, int kTiles>() {
      return run_clusters("backward_cluster", backward_cluster<Cell, M, kBlocks, kTiles>, typed,
                          shape, stream);
    });
  });
  return ran;
}

}  // namespace
}  // namespace frnn::cuda
