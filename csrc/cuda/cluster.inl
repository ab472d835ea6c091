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
bool run_clusters(const char* name, void (*kernel)(Args, ClusterShape), const Args& args,
                  const ClusterShape& shape, void* stream) {
  const int64_t clusters = divide_up(args.b, shape.tiles * kTileColumns);
  const Launch how{.grid = dim3(static_cast<unsigned>(clusters * shape.blocks)),
                   .block = dim3(static_cast<unsigned>(shape.warps * kWarpSize)),
                   .cluster = shape.blocks,
                   .smem = static_cast<size_t>(shape.bytes),
                   .stream = static_cast<cudaStream_t>(stream)};
  allow_shared_memory(name, kernel, current_device().shared_memory);
  if (shape.blocks > 1 && resident_clusters(name, kernel, how) == 0) return false;
  launch(name, kernel, how, args, shape);
  return true;
}

template <class M>
bool forward_in(int cell, const Forward<void, void>& args, const ClusterShape& shape,
                void* stream) {
  bool ran = false;
  with_types<M>(cell, args, [&]<class Cell>(auto typed) {
    typed.copied = common_unit({typed.h * int64_t{sizeof(typename M::S)}}, {typed.w_hh});
    ran = with_shape(shape, [&]<int kBlocks, int kTiles>() {
      return run_clusters("forward_cluster", forward_cluster<Cell, M, kBlocks, kTiles>, typed,
                          shape, stream);
    });
  });
  return ran;
}

template <class M>
bool backward_in(int cell, const Backward<void, void>& args, const ClusterShape& shape,
                 void* stream) {
  bool ran = false;
  with_types<M>(cell, args, [&]<class Cell>(auto typed) {
    typed.copied = common_unit({typed.h * int64_t{sizeof(typename M::S)}}, {typed.w_hh_t});
    ran = with_shape(shape, [&]<int kBlocks, int kTiles>() {
      return run_clusters("backward_cluster", backward_cluster<Cell, M, kBlocks, kTiles>, typed,
                          shape, stream);
    });
  });
  return ran;
}

}  // namespace
}  // namespace frnn::cuda
