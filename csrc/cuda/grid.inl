// SPDX-License-Identifier: Apache-2.0
// The launches of the grid algorithm.
#include "cuda/driver.h"
#include "cuda/grid.cuh"

namespace frnn::cuda {
namespace {

template <class Args>
bool run_grid(const char* name, void (*kernel)(Sides<Args>, GridShape, uint32_t*), int cluster,
              const Sides<Args>& sides, const GridShape& shape, uint32_t* error, void* stream) {
  const int blocks = sides.count * shape.teams * shape.blocks;
  const Launch how{.grid = dim3(static_cast<unsigned>(blocks)),
                   .block = dim3(kGridThreads),
                   .cluster = cluster,
                   .smem = static_cast<size_t>(shape.bytes),
                   .cooperative = true,
                   .stream = static_cast<cudaStream_t>(stream)};
  allow_shared_memory(name, kernel, current_device().shared_memory);
  const int resident = cluster > 1 ? resident_clusters(name, kernel, how) * cluster
                                   : resident_blocks(name, kernel, how);
  if (resident < blocks) return false;
  fill(name, sides.exchange, 0xff, static_cast<size_t>(shape.exchange), how.stream);  // kEmpty
  launch(name, kernel, how, sides, shape, error);
  return true;
}

template <class M>
bool forward_in(int cell, const ForwardSides& sides, const GridShape& shape, uint32_t* error,
                void* stream) {
  bool ran = false;
  with_types<M>(cell, sides, [&]<class Cell>(auto typed) {
    for (auto& f : typed.of)
      f.copied = common_unit({f.h * int64_t{sizeof(typename M::S)}}, {f.w_hh});
    ran = run_grid("forward_grid", forward_grid<Cell, M>, 1, typed, shape, error, stream);
  });
  return ran;
}

template <class M>
bool backward_in(int cell, const BackwardSides& sides, const GridShape& shape, uint32_t* error,
                 void* stream) {
  bool ran = false;
  with_types<M>(cell, sides, [&]<class Cell>(auto typed) {
    for (auto& f : typed.of)
      f.copied = common_unit({f.h * int64_t{sizeof(typename M::S)}}, {f.w_hh_t});
    ran = run_grid("backward_grid", backward_grid<Cell, M>, kClusterBlocks, typed, shape, error,
                   stream);
  });
  return ran;
}

}  // namespace
}  // namespace frnn::cuda
