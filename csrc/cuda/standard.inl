// SPDX-License-Identifier: Apache-2.0
// The launches of the standard algorithm. Every arithmetic includes this text in a translation unit
// of its own, so that they are compiled side by side.
#include "cells/cell.h"
#include "cuda/driver.h"
#include "cuda/standard.cuh"

namespace frnn::cuda {
namespace {

template <class Kernel, class Args, class... Rest>
void run(const char* name, Kernel kernel, dim3 grid, bool programmatic, void* stream,
         const Args& args, Rest... rest) {
  Launch how{.grid = grid, .block = dim3(kThreads)};
  how.programmatic = programmatic;
  how.stream = static_cast<cudaStream_t>(stream);
  launch(name, kernel, how, args, rest...);
}

dim3 grid(int64_t rows, int64_t units, int gates, int tiles) {
  const Blocks blocks = blocks_of(rows, units, gates, tiles);
  return dim3(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y));
}

dim3 elementwise_grid(int64_t rows, int64_t units) {
  return dim3(static_cast<unsigned>(divide_up(rows * units, kThreads)));
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class S>
bool rows_aligned(int64_t size) {
  return size * sizeof(S) % 16 == 0;
}

// A step's kernels may start before the ones ahead end, the first excepted: what is ahead of it
// (gx) is read without waiting.
template <class Cell, class M, int kTiles>
void run_forward(Forward<typename M::S, typename M::V> f, void* stream) {
  using S = typename M::S;
  f.aligned = rows_aligned<S>(f.p) && rows_aligned<S>(f.h) && aligned(f.w_hh) && aligned(f.w_hr) &&
              aligned(f.h_prev) && aligned(f.h_step) && aligned(f.m) && aligned(f.m_step);
  run("forward_start", forward_start<Cell, M>, elementwise_grid(f.b, f.p > f.h ? f.p : f.h), false,
      stream, f);
  for (int64_t s = 0; s < f.t; ++s) {
    run("forward_cells", forward_cells<Cell, M, kTiles>, grid(f.b, f.h, Cell::kGates, kTiles),
        s > 0, stream, f, s);
    if constexpr (!Cell::kReadsH) {
      if (f.w_hr == nullptr) continue;
      run("forward_project", forward_project<Cell, M, kTiles>, grid(f.b, f.p, 1, kTiles), true,
          stream, f, s);
    }
  }
}

template <class Cell, class M, int kTiles>
void run_backward(Backward<typename M::S, typename M::V> f, void* stream) {
  using S = typename M::S;
  f.aligned = rows_aligned<S>(f.p) && rows_aligned<S>(f.h) && aligned(f.w_hh_t) &&
              aligned(f.w_hr_t) && aligned(f.dgh) && aligned(f.dh);
  run("backward_start", backward_start<Cell, M>, elementwise_grid(f.b, f.p > f.h ? f.p : f.h),
      false, stream, f);
  for (int64_t s = f.t - 1; f.t > 0 && s >= -1; --s) {
    run("backward_gather", backward_gather<Cell, M, kTiles>, grid(f.b, f.p, 1, kTiles), s + 1 < f.t,
        stream, f, s);
    if constexpr (!Cell::kReadsH) {
      if (s < 0 || f.w_hr == nullptr) continue;
      run("backward_cells", backward_cells<Cell, M, kTiles>, grid(f.b, f.h, 1, kTiles), true,
          stream, f, s);
    }
  }
}

template <class M, class F>
void dispatch_tiles(int64_t rows, int64_t units, int gates, F f) {
  if (tiles_of(rows, units, gates, M::kMostTiles, multiprocessors()) == 1) {
    f.template operator()<1>();
  } else {
    f.template operator()<M::kMostTiles>();
  }
}

template <class M>
void forward_in(int cell, const Forward<void, void>& args, void* stream) {
  const auto typed = __builtin_bit_cast(Forward<typename M::S, typename M::V>, args);
  Cells::dispatch(cell, [&]<class Cell>() {
    dispatch_tiles<M>(args.b, args.h, Cell::kGates,
                      [&]<int kTiles>() { run_forward<Cell, M, kTiles>(typed, stream); });
  });
}

template <class M>
void backward_in(int cell, const Backward<void, void>& args, void* stream) {
  const auto typed = __builtin_bit_cast(Backward<typename M::S, typename M::V>, args);
  Cells::dispatch(cell, [&]<class Cell>() {
    dispatch_tiles<M>(args.b, args.p, 1,
                      [&]<int kTiles>() { run_backward<Cell, M, kTiles>(typed, stream); });
  });
}

}  // namespace
}  // namespace frnn::cuda
