// SPDX-License-Identifier: Apache-2.0
// The standard algorithm: one kernel a step, which forms the recurrent product and takes its sums
// through the cell while they are in registers. For any size, dtype and device.
//
// A block owns some units of some rows and gives all of k to its warps. Backward takes the weights
// transposed, so that both directions read them along k.
#pragma once

#include "cuda/kernels.h"
#include "cuda/product.cuh"
#include "steps.h"

namespace frnn::cuda {

constexpr int kThreads = kWarps * kWarpSize;
constexpr int kResident = 2;  // blocks on a multiprocessor: this step's and the next one's

// The first unit and row of this block.
struct Corner {
  int64_t unit, row;
};

template <int kGroups, int kTiles>
__device__ __forceinline__ Corner corner() {
  return {int64_t{blockIdx.y} * kGroups * kSlotRows, int64_t{blockIdx.x} * kTiles * kTileColumns};
}

// Where a lane's result belongs among `units` units and `rows` rows; false: outside.
__device__ __forceinline__ bool find_place(const Corner& from, const Result& result, int64_t rows,
                                           int64_t units, Place& p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = from.row + result.tile * kTileColumns + lane % 4 * 2 + result.j;
  const int64_t unit = from.unit + result.group * kSlotRows + lane / 4;
  p = {row, unit, row * units + unit, 1};
  return row < rows && unit < units;
}

// The rows of weights [gates * units, k] for this block, of each lane its unit of each group.
template <int kGates, int kGroups, class S>
__device__ __forceinline__ auto weight_rows(const S* w, int64_t units, int64_t k,
                                            const Corner& from) {
  const int64_t unit = from.unit + threadIdx.x % kWarpSize / 4;
  uint32_t there = 0;
  FRNN_UNROLL for (int slot = 0; slot < kGates * kGroups; ++slot) {
    if (unit + slot / kGates * kSlotRows < units) there |= 1u << slot;
  }
  return Factor(w + unit * k, there, [units, k](int slot) {
    return (slot % kGates * units + slot / kGates * kSlotRows) * k;
  });
}

// The rows of states [rows, k] for this block that are `wanted`, of each lane its column of each
// tile.
template <int kTiles, class S, class Wanted>
__device__ __forceinline__ auto state_rows(const S* states, int64_t rows, int64_t k,
                                           const Corner& from, const Wanted& wanted) {
  const int64_t row = from.row + threadIdx.x % kWarpSize / 4;
  uint32_t there = 0;
  FRNN_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t r = row + tile * kTileColumns;
    if (r < rows && wanted(r)) there |= 1u << tile;
  }
  return Factor(states + row * k, there, [k](int tile) { return tile * kTileColumns * k; });
}

// f(i, place) for the i-th of this lane's results, where there is one.
template <int kGroups, int kTiles, class F>
__device__ __forceinline__ void each_place(const Corner& from, int64_t rows, int64_t units,
                                           const F& f) {
  using Mine = Share<kGroups, kTiles>;
  FRNN_UNROLL for (int i = 0; i < Mine::kEach; ++i) {
    Result result;
    Place p;
    if (Mine::get(i, result) && find_place(from, result, rows, units, p)) f(i, p);
  }
}

// What precedes the first step, one thread for each unit of each row.
template <class Steps, class Args>
__device__ __forceinline__ void start(const Steps& steps, const Args& args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, p = args.p, h = args.h;
  if (i < args.b * p) steps.start_h(place<1>(i / p, i % p, p));
  if (i < args.b * h) steps.start_others(place<1>(i / h, i % h, h));
}

// ---- Forward.

template <class Cell, class M>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_start(const __grid_constant__ Forward<typename M::S, typename M::V> f) {
  const ForwardSteps<Cell, typename M::Real, typename M::S, typename M::V> steps(
      f, f.h_step, f.states_step, f.m_step);
  start(steps, f);
}

// W_hh h and the cell.
template <class Cell, class M, int kGroups, int kTiles>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_cells(const __grid_constant__ Forward<typename M::S, typename M::V> f, int64_t s) {
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = ForwardSteps<Cell, V, S, typename M::V>;
  using Mine = Share<kGroups, kTiles>;
  constexpr int kGates = Cell::kGates;
  const Steps steps(f, f.h_step, f.states_step, f.m_step);
  const Corner from = corner<kGroups, kTiles>();
  const int64_t t = steps.timeline().time(s), units = f.h;
  const bool plain = steps.timeline().full() && s + 1 < f.t;

  // gx does not depend on the step before and is read while it still runs; where there is too much
  // of it, it is fetched into the L2 cache, and read as soon as there are registers for it.
  constexpr bool kEarly = Mine::kEach <= 2;
  S gx[Mine::kEach][kGates];
  const auto each_gx = [&](const auto& take) {
    each_place<kGroups, kTiles>(from, f.b, units, [&](int i, const Place& p) {
      const S* row = f.gx + (t * f.b + p.row) * kGates * units + p.unit;
      FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) take(gx[i][gate], row + gate * units);
    });
  };
  const auto read = [](S& x, const S* address) { x = *address; };
  typename Steps::Inputs in[Mine::kEach];
  const auto before = [&] {
    if constexpr (kEarly) {
      each_gx(read);
    } else {
      each_gx([](S&, const S* address) { prefetch(address); });
    }
    dependency_wait();
  };
  const auto after = [&] {
    if constexpr (!kEarly) each_gx(read);
    each_place<kGroups, kTiles>(from, f.b, units,
                                [&](int i, const Place& p) { in[i] = steps.read_cell(s, p); });
  };
  const auto rows = state_rows<kTiles>(steps.h_in(s), f.b, f.p, from, [&](int64_t row) {
    return steps.timeline().computed(s, row);
  });
  const auto done = [&](int i, const Result& result, const V* gh) {
    Place p;
    if (!find_place(from, result, f.b, units, p)) return;
    V of_x[kGates];
    FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) of_x[gate] = load<V>(&gx[i][gate], 1);
    if (plain) {
      steps.template finish_cell<true>(s, p, of_x, gh, in[i]);
    } else {
      steps.template finish_cell<false>(s, p, of_x, gh, in[i]);
    }
  };
  dependency_launch();
  product<M, kGates, kGroups, kTiles>(f.p, f.copied,
                                      weight_rows<kGates, kGroups>(f.w_hh, units, f.p, from), rows,
                                      before, after, done);
}

// W_hr m, the output of a step with a projection.
template <class Cell, class M, int kGroups, int kTiles>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_project(const __grid_constant__ Forward<typename M::S, typename M::V> f, int64_t s) {
  using S = typename M::S;
  using V = typename M::Real;
  const ForwardSteps<Cell, V, S, typename M::V> steps(f, f.h_step, f.states_step, f.m_step);
  const Corner from = corner<kGroups, kTiles>();
  const auto rows = state_rows<kTiles>(steps.m_at(s), f.b, f.h, from, [&](int64_t row) {
    return steps.timeline().computed(s, row);
  });
  const auto done = [&](int, const Result& result, const V* h) {
    Place p;
    if (find_place(from, result, f.b, f.p, p)) steps.template finish_output<false>(s, p, h[0]);
  };
  dependency_launch();
  product<M, 1, kGroups, kTiles>(
      f.h, f.copied, weight_rows<1, kGroups>(f.w_hr, f.p, f.h, from), rows,
      [] { dependency_wait(); }, [] {}, done);
}

// ---- Backward.

template <class Cell, class M>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_start(const __grid_constant__ Backward<typename M::S, typename M::V> f) {
  const BackwardSteps<Cell, typename M::Real, typename M::S, typename M::V> steps(f);
  start(steps, f);
}

template <class Cell, class S, class A>
__device__ StepGradients<S> at_time(const Backward<S, A>& f, int64_t t) {
  const int64_t rows = t * f.b, gates = rows * Cell::kGates * f.h;
  return {f.dgx + gates, f.dgh + gates, f.w_hr ? f.dh + rows * f.p : nullptr};
}

// dgh W_hh of the step after, and the cell unless a projection comes first.
//
// What forward saved lies beyond the L2 cache and is fetched while the step before still runs. It
// is read for all results at once: stores might change what is loaded after them.
template <class Cell, class M, int kGroups, int kTiles>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_gather(const __grid_constant__ Backward<typename M::S, typename M::V> f, int64_t s) {
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = BackwardSteps<Cell, V, S, typename M::V>;
  using Mine = Share<kGroups, kTiles>;
  const Steps steps(f);
  const Corner from = corner<kGroups, kTiles>();
  const bool plain = steps.timeline().full() && s >= 0 && s + 1 < f.t && f.w_hr == nullptr;
  const int64_t k = Cell::kGates * f.h, after_s = s + 1 < f.t ? s + 1 : s;
  const S* dgh = at_time<Cell>(f, steps.timeline().time(after_s)).dgh;
  const StepGradients<S> to = at_time<Cell>(f, steps.timeline().time(s));  // not used if s is -1
  const auto rows =
      state_rows<kTiles>(dgh, f.b, k, from, [&](int64_t row) { return steps.flows_back(s, row); });
  typename Steps::OfH h[Mine::kEach];
  typename Steps::OfCell cell[Mine::kEach];
  const auto before = [&] {
    each_place<kGroups, kTiles>(from, f.b, f.p, [&](int, const Place& p) {
      const auto fetch = [](const void* address) { prefetch(address); };
      if (s >= 0) steps.fetch_h(s, p, fetch);
      if (steps.gathers_cells(s)) steps.fetch_cell(s, p, fetch);
    });
    dependency_wait();
  };
  const auto after = [&] {
    each_place<kGroups, kTiles>(from, f.b, f.p, [&](int i, const Place& p) {
      if (plain) {
        h[i] = steps.template read_h<true>(s, p);
        cell[i] = steps.template read_cell<true>(s, p);
      } else {
        h[i] = steps.template read_h<false>(s, p);
        if (steps.gathers_cells(s)) cell[i] = steps.template read_cell<false>(s, p);
      }
    });
  };
  const auto done = [&](int i, const Result& result, const V* dh) {
    Place p;
    if (!find_place(from, result, f.b, f.p, p)) return;
    if (plain) {
      steps.template finish_gather<true>(s, p, dh[0], h[i], cell[i], to);
    } else {
      steps.template finish_gather<false>(s, p, dh[0], h[i], cell[i], to);
    }
  };
  dependency_launch();
  product<M, 1, kGroups, kTiles>(s + 1 < f.t ? k : 0, f.copied,
                                 weight_rows<1, kGroups>(f.w_hh_t, f.p, k, from), rows, before,
                                 after, done);
}

// dh W_hr and the cell, at a step with a projection.
template <class Cell, class M, int kGroups, int kTiles>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_cells(const __grid_constant__ Backward<typename M::S, typename M::V> f, int64_t s) {
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = BackwardSteps<Cell, V, S, typename M::V>;
  const Steps steps(f);
  const Corner from = corner<kGroups, kTiles>();
  const auto rows =
      state_rows<kTiles>(f.dh + steps.timeline().time(s) * f.b * f.p, f.b, f.p, from,
                         [&](int64_t row) { return steps.timeline().computed(s, row); });
  typename Steps::OfCell cell[Share<kGroups, kTiles>::kEach];
  const auto before = [&] {
    each_place<kGroups, kTiles>(from, f.b, f.h, [&](int, const Place& p) {
      steps.fetch_cell(s, p, [](const void* address) { prefetch(address); });
    });
    dependency_wait();
  };
  const auto after = [&] {
    each_place<kGroups, kTiles>(from, f.b, f.h, [&](int i, const Place& p) {
      cell[i] = steps.template read_cell<false>(s, p);
    });
  };
  const auto done = [&](int i, const Result& result, const V* dm) {
    Place p;
    if (!find_place(from, result, f.b, f.h, p)) return;
    const StepGradients<S> to = at_time<Cell>(f, steps.timeline().time(s));
    steps.template finish_cell<false>(s, p, dm[0], cell[i], to);
  };
  dependency_launch();
  product<M, 1, kGroups, kTiles>(f.p, f.copied, weight_rows<1, kGroups>(f.w_hr_t, f.h, f.p, from),
                                 rows, before, after, done);
}

}  // namespace frnn::cuda
