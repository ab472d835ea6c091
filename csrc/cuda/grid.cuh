// SPDX-License-Identifier: Apache-2.0
// The grid algorithm: one kernel runs all steps, for weights that only many blocks can hold. A team
// of blocks owns a few rows and W_hh; all blocks of all teams are resident at once.
//
// A block owns sixteen units with all their gates, and gives each of its warps a share of k. What
// its units become goes through global memory to every block of the team, in the layout in which it
// is multiplied, and the data is its own flag: a word is kEmpty until it has come. h has four slots
// that take turns. At step n, once a block has all of h_n:
//
//   every block has published h_n, hence left step n - 1, hence read all of h_{n-1}: its owner
//   empties that slot. The fence after that orders it before h_{n+2}, which its readers will have
//   seen, and passed a fence, before they look there for h_{n+3}.
//
// Nobody waits for ever: a block that waits too long says so in the error word and leaves.
#pragma once

#include "cuda/resident.cuh"
#include "cuda/standard.h"

namespace frnn::cuda {

constexpr int kGridThreads = kGridWarps * kWarpSize;
constexpr int kHSlots = 4;
constexpr uint32_t kEmpty =
    0xffffffffu;  // no number: a NaN becomes another one where it is rounded

template <class Cell, int kTiles>
struct GridSizes {
  static constexpr int kSlots = grid_slots(Cell::kGates);
  static constexpr int kHeld = grid_held(Cell::kGates);
  static constexpr int kResults =
      kGridGroups * kTiles * 2;  // each a warp's: a lane has one at most
  static_assert(kResults <= kGridWarps);
};

// The piece of eight, four or two values that a word of such a piece belongs to has come.
__device__ __forceinline__ bool has_come(const uint4& v) {
  return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty;
}

// Polls kN pieces until all that are `needed` (by bit) have come; false if that takes too long.
template <int kN>
__device__ __forceinline__ bool receive(const uint4* const (&from)[kN], uint32_t needed,
                                        uint4 (&v)[kN], uint64_t patience) {
  const uint64_t start = cycles();
  for (;;) {
    bool all = true;
    FRNN_UNROLL for (int i = 0; i < kN; ++i) {
      if (needed >> i & 1) v[i] = load_relaxed(from[i]);
    }
    FRNN_UNROLL for (int i = 0; i < kN; ++i) {
      if (needed >> i & 1) all = all && has_come(v[i]);
    }
    if (all) return true;
    if (cycles() - start > patience) return false;
  }
}

// ---- Forward.

template <class Cell, class M, int kTiles>
__global__ void __launch_bounds__(kGridThreads, 1)
    forward_grid(const __grid_constant__ Forward<typename M::S, typename M::V> f,
                 const __grid_constant__ GridShape shape, uint32_t* error) {
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = ForwardSteps<Cell, V, S, typename M::V>;
  using Sizes = GridSizes<Cell, kTiles>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kValues = Piece<S>::kValues;
  constexpr int kSlots = Sizes::kSlots, kHeld = Sizes::kHeld;
  FRNN_DYN_SMEM(shared);

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int rank = blockIdx.x % shape.blocks, team = blockIdx.x / shape.blocks;
  const int64_t first_row = int64_t{team} * kTiles * kTileColumns;
  const int each = shape.each, chunks = shape.chunks;  // of k: of a warp, of all
  const Steps steps(f, nullptr, nullptr, nullptr);
  const Timeline<S>& timeline = steps.timeline();
  const Span span = span_of(timeline, f, first_row, kTiles * kTileColumns);

  // h of the team: [4, kTiles, chunks, 32].
  const auto h_of = [&](int64_t n, int tile) {
    const int64_t operand = (int64_t{team} * kHSlots + n % kHSlots) * kTiles + tile;
    return static_cast<Piece<S>*>(f.exchange) + operand * chunks * kWarpSize;
  };
  // The warps' sums: [2, kGridWarps, kTiles, kSlots, 2, 32].
  const auto sums_of = [&](int64_t n, int w, int tile, int slot, int j) -> float& {
    float* const sums = reinterpret_cast<float*>(shared + shape.sums);
    return sums[((((n % 2 * kGridWarps + w) * kTiles + tile) * kSlots + slot) * 2 + j) * kWarpSize +
                lane];
  };

  // Whether one of the warps has waited in vain at step n: [2].
  const auto failed = [&](int64_t n) -> uint32_t& {
    return reinterpret_cast<uint32_t*>(shared + shape.failed)[n % 2];
  };

  // The lane's result and its place.
  const bool mine = warp < Sizes::kResults;
  const int group = warp / 2 / kTiles, tile_of = warp / 2 % kTiles, j_of = warp % 2;
  const int column = lane % 4 * 2 + j_of, own_unit = group * kSlotRows + lane / 4;
  const int team_unit = rank * kGridUnits + own_unit;
  Place p{first_row + tile_of * kTileColumns + column, team_unit, 0, 1};
  p.offset = p.row * f.h + p.unit;
  const bool row_there = mine && p.row < f.b, there = row_there && p.unit < f.h;

  ResidentWeights<S, kSlots, kHeld> weights;
  {
    const auto first = reinterpret_cast<Piece<S>*>(shared) +
                       warp * (each > kHeld ? each - kHeld : 0) * kSlots * kWarpSize;
    const auto load = [&](bool aligned) {
      weights.template load<M>(first, each, [&](int chunk, int slot) {
        const int64_t unit = int64_t{rank} * kGridUnits + slot / kGates * kSlotRows + lane / 4;
        const int64_t k = (int64_t{warp} * each + chunk) * 4 * kValues + lane % 4 * kValues;
        const bool in = unit < f.h && chunk < each;
        return weights_at(f.w_hh + (slot % kGates * f.h + unit) * f.h, k, in ? f.h : 0, aligned,
                          reinterpret_cast<Piece<S>*>(shared + shape.sums));
      });
    };
    if (f.copied == 16) {
      load(true);
    } else {
      load(false);
    }
  }

  // A word holds one value, or two of neighbouring units, of which the first one's lane stores it.
  const auto publish = [&](int64_t n, V h) {
    if (!mine) return;
    S* const to = &operand_at(h_of(n, tile_of), team_unit, column);
    // A NaN of a unit that is not there would come back, times 0.
    const S value = M::operand(static_cast<S>(p.unit < f.h ? h : V(0)));
    if constexpr (sizeof(S) == 4) {
      if (row_there)
        store_relaxed(reinterpret_cast<uint32_t*>(to), __builtin_bit_cast(uint32_t, value));
    } else {
      const uint32_t own = __builtin_bit_cast(uint16_t, value);
      const uint32_t other = __shfl_xor_sync(~0u, own, 4);
      if (row_there && lane / 4 % 2 == 0) {
        store_relaxed(reinterpret_cast<uint32_t*>(to), own | other << 16);
      }
    }
  };
  const auto empty = [&](int64_t n) {
    if (row_there && (sizeof(S) == 4 || lane / 4 % 2 == 0)) {
      store_relaxed(reinterpret_cast<uint32_t*>(&operand_at(h_of(n, tile_of), team_unit, column)),
                    kEmpty);
    }
  };

  typename Steps::Inputs in = {};
  S gx[kGates] = {};
  const auto read_gx = [&](int64_t s) {
    if (!there) return;
    const S* row = f.gx + (timeline.time(s) * f.b + p.row) * kGates * f.h + p.unit;
    FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) gx[gate] = row[gate * f.h];
  };
  if (there) {
    steps.start_h(p);
    steps.start_others(p);
    for (int j = 0; j < kStates; ++j) {
      in.state[j] = steps.entering(timeline.entry(span.begin, p.row), p, j, V(0));
    }
    steps.read_bias(p, in);
    for (int64_t s = 0; s < span.begin; ++s) steps.template keep<false>(s, p, {});
  }
  if (span.begin < span.end) {
    publish(0, in.state[0]);
    read_gx(span.begin);
  }
  if (threadIdx.x < 2) failed(threadIdx.x) = 0;
  __syncthreads();

  // Which pieces of an operand come at all: of rows and units that are there.
  const auto needed = [&](int first, int tile) {
    uint32_t bits = 0;
    const bool row = first_row + tile * kTileColumns + lane / 4 < f.b;
    FRNN_UNROLL for (int c = 0; c < kHeld; ++c) {
      const int piece = (warp * each + first + c) * 4 + lane % 4;
      if (row && first + c < each && piece * kValues < shape.blocks * kGridUnits) bits |= 1u << c;
    }
    return bits;
  };

  bool lost = false;
  for (int64_t s = span.begin; s < span.end && !lost; ++s) {
    const int64_t n = s - span.begin;
    const bool plain = timeline.full() && s + 1 < f.t, more = s + 1 < span.end;
    FRNN_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
      const Piece<S>* const h = h_of(n, tile) + warp * each * kWarpSize + lane_in_chunk();
      ResidentProduct<M, kSlots, kHeld> product;
      product.run(weights, each, [&](int first, auto& b) {
        constexpr int kBatch = decltype(product)::kBatch;
        const uint4* from[kBatch];
        uint4 v[kBatch] = {};
        FRNN_UNROLL for (int c = 0; c < kBatch; ++c) {
          from[c] = reinterpret_cast<const uint4*>(h + (first + c) * kWarpSize);
        }
        if (!receive(from, needed(first, tile), v, shape.patience)) failed(n) = 1;
        FRNN_UNROLL for (int c = 0; c < kBatch; ++c) b[c][0] = __builtin_bit_cast(Piece<S>, v[c]);
      });
      FRNN_UNROLL for (int slot = 0; slot < kSlots; ++slot) {
        FRNN_UNROLL for (int j = 0; j < 2; ++j) sums_of(n, warp, tile, slot, j) =
            product.get(slot, j);
      }
    }
    __syncthreads();
    lost = failed(n) != 0;
    if (lost) break;

    typename Steps::Outcome result = {};
    if (mine) {
      V of_x[kGates], of_h[kGates];
      FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
        of_x[gate] = load<V>(&gx[gate], 1);
        float sum = 0;
        FRNN_UNROLL for (int w = 0; w < kGridWarps; ++w) {
          sum += sums_of(n, w, tile_of, group * kGates + gate, j_of);
        }
        of_h[gate] = sum;
      }
      // Rows and units that are not there take part, up to what they would pass on.
      result = steps.compute(of_x, of_h, in);
      FRNN_UNROLL for (int j = 0; j < kStates; ++j) in.state[j] = result.out[j];
      if (!plain && there) {
        if (!timeline.computed(s, p.row)) result = {};
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) {
          in.state[j] = steps.entering(timeline.entry(s + 1, p.row), p, j, result.out[j]);
        }
      }
      in.state[0] = static_cast<V>(static_cast<S>(in.state[0]));
      if (more) publish(n + 1, in.state[0]);
      if (n > 0) empty(n - 1);
    }
    fence_gpu();
    if (there) {
      if (more) read_gx(s + 1);
      if (plain) {
        steps.template keep<true>(s, p, result);
      } else {
        steps.template keep<false>(s, p, result);
      }
    }
  }

  if (lost) {
    if (threadIdx.x == 0) {
      store_system(error + 1, static_cast<uint32_t>(f.b));
      store_system(error + 2, static_cast<uint32_t>(f.h));
      fence_system();
      store_system(error, 1);
    }
    if (there) steps.spoil(p);
    return;
  }
  if (there) {
    for (int64_t s = span.end; s < f.t; ++s) steps.template keep<false>(s, p, {});
  }
}

}  // namespace frnn::cuda
