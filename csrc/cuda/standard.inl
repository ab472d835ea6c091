// SPDX-License-Identifier: Apache-2.0
// The launches of the standard algorithm.
#include <stdexcept>
#include <string>

#include "cuda/driver.h"
#include "cuda/standard.cuh"

namespace frnn::cuda {
namespace {

// One kernel of a step: launched with the step's number, maybe before the kernel ahead has ended.
template <class Args>
struct StepKernel {
  const char* name;
  void (*kernel)(Args, int64_t) = nullptr;
  Launch how = {};

  void run(const Args& args, int64_t s, bool programmatic) {
    how.programmatic = programmatic;
    launch(name, kernel, how, args, s);
  }
};

// The instance for the size that suits a product of `rows` rows of states with `units` units of
// kGates gates: kernel<kGroups, kTiles>().
template <class Args, class M, int kGates, class Kernel>
StepKernel<Args> choose(const char* name, int64_t rows, int64_t units, void* stream,
                        const Kernel& kernel) {
  StepKernel<Args> chosen{.name = name};
  const auto take = [&]<int kSize>() {
    constexpr Shape kShape = shape_of(kGates, kSize, M::kArithmetic);
    const Blocks blocks = blocks_of(rows, units, kShape);
    if (blocks.y > 65535) throw std::runtime_error(std::string(name) + ": too many units");
    chosen.kernel = kernel.template operator()<kShape.groups, kShape.tiles>();
    chosen.how =
        Launch{.grid = dim3(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y)),
               .block = dim3(kThreads),
               .smem = Memory<M, kGates, kShape.groups, kShape.tiles>::kBytes,
               .stream = static_cast<cudaStream_t>(stream)};
  };
  switch (size_of(rows, units, kGates, M::kArithmetic, current_device().multiprocessors)) {
    case 0:
      take.template operator()<0>();
      break;
    case 1:
      take.template operator()<1>();
      break;
    default:
      if constexpr (sizes_of(kGates, M::kArithmetic) > 2) take.template operator()<2>();
  }
  allow_shared_memory(name, chosen.kernel, chosen.how.smem);
  return chosen;
}

template <class Args>
void run_start(const char* name, void (*kernel)(Args), const Args& args, void* stream) {
  const int64_t units = args.b * (args.p > args.h ? args.p : args.h);
  const Launch how{.grid = dim3(static_cast<unsigned>(divide_up(units, kThreads))),
                   .block = dim3(kThreads),
                   .stream = static_cast<cudaStream_t>(stream)};
  launch(name, kernel, how, args);
}

// A step's kernels may start before the ones ahead end, the first excepted: what is ahead of it
// (gx) is read without waiting.
template <class Cell, class M>
void run_forward(Forward<typename M::S, typename M::V> f, void* stream) {
  using Args = decltype(f);
  constexpr int64_t kSize = sizeof(typename M::S);
  f.copied =
      common_unit({f.p * kSize, f.h * kSize}, {f.w_hh, f.w_hr, f.h_prev, f.h_step, f.m, f.m_step});
  auto cells = choose<Args, M, Cell::kGates>(
      "forward_cells", f.b, f.h, stream,
      [&]<int kGroups, int kTiles>() { return forward_cells<Cell, M, kGroups, kTiles>; });
  const auto steps = [&](auto project) {
    run_start("forward_start", forward_start<Cell, M>, f, stream);
    for (int64_t s = 0; s < f.t; ++s) {
      cells.run(f, s, s > 0);
      project(s);
    }
  };
  if constexpr (!Cell::kReadsH) {
    if (f.w_hr) {
      auto project = choose<Args, M, 1>(
          "forward_project", f.b, f.p, stream,
          [&]<int kGroups, int kTiles>() { return forward_project<Cell, M, kGroups, kTiles>; });
      return steps([&](int64_t s) { project.run(f, s, true); });
    }
  }
  steps([](int64_t) {});
}

template <class Cell, class M>
void run_backward(Backward<typename M::S, typename M::V> f, void* stream) {
  using Args = decltype(f);
  constexpr int64_t kSize = sizeof(typename M::S);
  f.copied = common_unit({f.p * kSize, f.h * kSize}, {f.w_hh_t, f.w_hr_t, f.dgh, f.dh});
  auto gather = choose<Args, M, 1>(
      "backward_gather", f.b, f.p, stream,
      [&]<int kGroups, int kTiles>() { return backward_gather<Cell, M, kGroups, kTiles>; });
  const auto steps = [&](auto cells) {
    run_start("backward_start", backward_start<Cell, M>, f, stream);
    for (int64_t s = f.t - 1; f.t > 0 && s >= -1; --s) {
      gather.run(f, s, s + 1 < f.t);
      if (s >= 0) cells(s);
    }
  };
  if constexpr (!Cell::kReadsH) {
    if (f.w_hr) {
      auto cells = choose<Args, M, 1>(
          "backward_cells", f.b, f.h, stream,
          [&]<int kGroups, int kTiles>() { return backward_cells<Cell, M, kGroups, kTiles>; });
      return steps([&](int64_t s) { cells.run(f, s, true); });
    }
  }
  steps([](int64_t) {});
}

template <class M>
void forward_in(int cell, const ForwardSides& sides, void* stream) {
  with_types<M>(cell, sides, [&]<class Cell>(const auto& typed) {
    for (int i = 0; i < typed.count; ++i) run_forward<Cell, M>(typed.of[i], stream);
  });
}

template <class M>
void backward_in(int cell, const BackwardSides& sides, void* stream) {
  with_types<M>(cell, sides, [&]<class Cell>(const auto& typed) {
    for (int i = 0; i < typed.count; ++i) run_backward<Cell, M>(typed.of[i], stream);
  });
}

}  // namespace
}  // namespace frnn::cuda
