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
//   empties that slot. A fence orders it before h_{n+2}, which its readers will have seen, and
//   passed a fence, before they look there for h_{n+3}.
//
// In backward the blocks of a team are clusters of eight. Of what a step's gates become, a block
// gathers that of one block of each cluster, the one with its own rank in it, and multiplies it
// with the weights to the 128 units of its cluster, whose blocks each add up their share as those
// of the cluster algorithm do. So a block reads an eighth of what all gates become.
//
// Nobody waits for ever: a block that waits too long says so in the error words and leaves, and
// what it should have returned is NaN.
#pragma once

#include "cuda/kernels.h"
#include "cuda/resident.cuh"

namespace frnn::cuda {

constexpr int kGridThreads = kGridWarps * kWarpSize;
constexpr uint32_t kEmpty = 0xffffffffu;  // never a value: rounding leaves other NaNs

// The lane's result, if its warp has one: kGridGroups * kTiles * 2 warps have one for each lane.
template <int kTiles>
struct GridSeat {
  static_assert(kGridGroups * kTiles * 2 <= kGridWarps);
  int lane, warp, group, tile, column;
  bool mine;

  __device__ __forceinline__ GridSeat()
      : lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize),
        group(warp / 2 / kTiles),
        tile(warp / 2 % kTiles),
        column(lane % 4 * 2 + warp % 2),
        mine(warp < kGridGroups * kTiles * 2) {}

  __device__ __forceinline__ int own_unit() const { return group * kSlotRows + lane / 4; }
};

// A word of an exchange holds one value, or two of neighbouring units, of which the first one's
// lane stores it.
template <class S>
__device__ __forceinline__ bool stores_word(int lane) {
  return sizeof(S) == 4 || lane / 4 % 2 == 0;
}
template <class S>
__device__ __forceinline__ uint32_t word_of(S value) {
  if constexpr (sizeof(S) == 4) {
    return __builtin_bit_cast(uint32_t, value);
  } else {
    uint16_t own;  // initialised, it would be taken for a constant, on which nvcc 13.0 fails
    own = __builtin_bit_cast(uint16_t, value);
    return own | __shfl_xor_sync(~0u, uint32_t{own}, 4) << 16;
  }
}

template <class Cell, int kTiles>
struct GridSizes {
  static constexpr int kSlots = grid_slots(Cell::kGates);
  static constexpr int kHeld = grid_held(Cell::kGates, kTiles, false);
  static constexpr int kHeldBackward = grid_held(Cell::kGates, kTiles, true);
};

// Whether all words of a piece have come.
__device__ __forceinline__ bool has_come(const uint4& v) {
  return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty;
}

// Polls kN pieces until all that are `needed` (by bit) have come; false if that takes too long.
template <int kN>
__device__ __forceinline__ bool receive(const uint4* const (&from)[kN], uint32_t needed,
                                        uint4 (&v)[kN], int64_t patience) {
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
    if (static_cast<int64_t>(cycles() - start) > patience) return false;
  }
}

// Before the first exchange blocks may have to wait for other kernels to leave.
__device__ __forceinline__ int64_t patience_at(const GridShape& shape, int64_t n) {
  return n <= 1 ? 8 * shape.patience : shape.patience;
}

// For the host: which kernel waited in vain, with which batch and hidden size.
__device__ __forceinline__ void give_up(uint32_t* error, int64_t b, int64_t h, uint32_t kernel) {
  if (threadIdx.x > 0) return;
  store_system(error + 1, static_cast<uint32_t>(b));
  store_system(error + 2, static_cast<uint32_t>(h));
  fence_system();
  store_system(error, kernel);
}

// ---- Forward.

template <class Cell, class M, int kTiles>
__global__ void __launch_bounds__(kGridThreads, 1)
    forward_grid(const __grid_constant__ Sides<Forward<typename M::S, typename M::V>> sides,
                 const __grid_constant__ GridShape shape, uint32_t* error) {
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = ForwardSteps<Cell, V, S, typename M::V>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kValues = Piece<S>::kValues;
  constexpr int kSlots = GridSizes<Cell, kTiles>::kSlots, kHeld = GridSizes<Cell, kTiles>::kHeld;
  FRNN_DYN_SMEM(shared);
  const GridSeat<kTiles> seat;
  const int lane = seat.lane, warp = seat.warp;
  const int rank = blockIdx.x % shape.blocks, team = blockIdx.x / shape.blocks;
  const int side = team >= shape.teams;
  const auto& f = sides.of[side];
  const int64_t first_row = int64_t{team - side * shape.teams} * kTiles * kTileColumns;
  const int each = shape.each, chunks = shape.chunks;  // of k: of a warp, of all
  const Steps steps(f, nullptr, nullptr, nullptr);
  const Timeline<S>& timeline = steps.timeline();
  const Span span =
      span_of(timeline, f, kTiles * kTileColumns, [&](int i) { return first_row + i; });

  // h of the team: [4, kTiles, chunks, 32].
  const auto h_of = [&](int64_t n, int tile) {
    const int64_t operand = (int64_t{team} * kExchangeSlots + n % kExchangeSlots) * kTiles + tile;
    return static_cast<Piece<S>*>(sides.exchange) + operand * chunks * kWarpSize;
  };
  // The warps' sums: [2, kGridWarps, kTiles, kSlots, 2, 32].
  const auto sums_of = [&](int64_t n, int w, int tile, int slot, int j) -> float& {
    float* const sums = reinterpret_cast<float*>(shared + shape.sums);
    return sums[((((n % 2 * kGridWarps + w) * kTiles + tile) * kSlots + slot) * 2 + j) * kWarpSize +
                lane];
  };

  // Whether a thread has waited in vain at step n: [2].
  const auto failed = [&](int64_t n) -> uint32_t& {
    return reinterpret_cast<uint32_t*>(shared + shape.failed)[n % 2];
  };

  const int team_unit = rank * kGridUnits + seat.own_unit();
  Place p{first_row + seat.tile * kTileColumns + seat.column, team_unit, 0, 1};
  p.offset = p.row * f.h + p.unit;
  const bool row_there = seat.mine && p.row < f.b, there = row_there && p.unit < f.h;

  ResidentWeights<S, kSlots, kHeld> weights;
  {
    const auto first = reinterpret_cast<Piece<S>*>(shared) +
                       warp * (each > kHeld ? each - kHeld : 0) * kSlots * kWarpSize;
    weights.template load<M>(
        first, each, f.copied == 16, reinterpret_cast<Piece<S>*>(shared + shape.sums),
        [&](int chunk, int slot) {
          const int64_t unit = int64_t{rank} * kGridUnits + slot / kGates * kSlotRows + lane / 4;
          const int64_t k = (int64_t{warp} * each + chunk) * 4 * kValues + lane % 4 * kValues;
          const bool in = unit < f.h && chunk < each;
          return WeightSource<S>{f.w_hh + (slot % kGates * f.h + unit) * f.h, k, in ? f.h : 0};
        });
  }

  const auto own_word = [&](int64_t n) {
    return reinterpret_cast<uint32_t*>(&operand_at(h_of(n, seat.tile), team_unit, seat.column));
  };
  const auto publish = [&](int64_t n, V h) {
    // A NaN of a unit that is not there would come back, times 0.
    const uint32_t word = word_of(M::operand(static_cast<S>(p.unit < f.h ? h : V(0))));
    if (row_there && stores_word<S>(lane)) store_relaxed(own_word(n), word);
  };

  typename Steps::Inputs in = {};
  S gx[kGates] = {};
  Entry now = Entry::kNone, next = Entry::kNone;  // of step s, and of the one after it
  const auto read_ahead = [&](int64_t s) {
    if (!there) return;
    now = next;
    next = timeline.entry(s + 1, p.row);
    const S* row = f.gx + (timeline.time(s) * f.b + p.row) * kGates * f.h + p.unit;
    FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) gx[gate] = row[gate * f.h];
  };
  if (there) {
    steps.start_h(p);
    steps.start_others(p);
    next = timeline.entry(span.begin, p.row);
    for (int j = 0; j < kStates; ++j) in.state[j] = steps.entering(next, p, j, V(0));
    steps.read_of_units(p, in);
    for (int64_t s = 0; s < span.begin; ++s) steps.template keep<false>(s, p, {});
  }
  if (span.begin < span.end) {
    if (seat.mine) publish(0, in.state[0]);
    read_ahead(span.begin);
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
    bool came = true;
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
        if (came && !receive(from, needed(first, tile), v, patience_at(shape, n))) {
          came = false;
          failed(n) = 1;
        }
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
    if (seat.mine) {
      V of_x[kGates], of_h[kGates];
      FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
        of_x[gate] = load<V>(&gx[gate], 1);
        float sum = 0;
        FRNN_UNROLL for (int w = 0; w < kGridWarps; ++w) {
          sum += sums_of(n, w, seat.tile, seat.group * kGates + gate, warp % 2);
        }
        of_h[gate] = sum;
      }
      // Rows and units that are not there take part, up to what they would pass on.
      result = steps.compute(of_x, of_h, in);
      FRNN_UNROLL for (int j = 0; j < kStates; ++j) in.state[j] = result.out[j];
      if (!plain && there) {
        if (now == Entry::kNone) result = {};
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) {
          in.state[j] = steps.entering(next, p, j, result.out[j]);
        }
      }
      in.state[0] = static_cast<V>(static_cast<S>(in.state[0]));
      if (more) publish(n + 1, in.state[0]);
      if (n > 0 && row_there && stores_word<S>(lane)) store_relaxed(own_word(n - 1), kEmpty);
    }
    fence_gpu();
    if (there) {
      if (more) read_ahead(s + 1);
      if (plain) {
        steps.template keep<true>(s, p, result);
      } else {
        steps.template keep<false>(s, p, result);
      }
    }
  }

  if (lost) {
    give_up(error, f.b, f.h, 1);
    if (there) steps.spoil(p);
    return;
  }
  if (there) {
    for (int64_t s = span.end; s < f.t; ++s) steps.template keep<false>(s, p, {});
  }
}

// ---- Backward.

template <class Cell, class M, int kTiles>
__global__ void __launch_bounds__(kGridThreads, 1)
    backward_grid(const __grid_constant__ Sides<Backward<typename M::S, typename M::V>> sides,
                  const __grid_constant__ GridShape shape, uint32_t* error) {
#if FRNN_HAVE_CLUSTER
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = BackwardSteps<Cell, V, S, typename M::V>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kValues = Piece<S>::kValues;
  constexpr int kSlots = kGridGroups, kHeld = GridSizes<Cell, kTiles>::kHeldBackward;
  constexpr int kBlocks = kClusterBlocks;
  static_assert(kBlocks == kGridWarps, "each warp multiplies for a block of the cluster");
  FRNN_DYN_SMEM(shared);
  const GridSeat<kTiles> seat;
  const int lane = seat.lane, warp = seat.warp, chunks = shape.chunks;
  const int clusters = shape.blocks / kBlocks;  // of a team
  const int rank = blockIdx.x % kBlocks, cluster = blockIdx.x / kBlocks % clusters;
  const int team = blockIdx.x / shape.blocks, side = team >= shape.teams;
  const auto& f = sides.of[side];
  const int64_t first_row = int64_t{team - side * shape.teams} * kTiles * kTileColumns;
  const Steps steps(f);
  const Timeline<S>& timeline = steps.timeline();
  const Span span =
      span_of(timeline, f, kTiles * kTileColumns, [&](int i) { return first_row + i; });

  // The gates' gradients that blocks of this rank exchange: [4, kTiles, 8, chunks, 32] of the team.
  const auto exchanged = [&](int64_t n, int tile) {
    const int64_t slot = int64_t{team} * kExchangeSlots + n % kExchangeSlots;
    const int64_t operand = (slot * kTiles + tile) * kBlocks + rank;
    return static_cast<Piece<S>*>(sides.exchange) + operand * chunks * kWarpSize;
  };
  const auto operand_of = [&](int64_t n, int tile) {
    const int64_t operand = tile * 2 + n % 2;
    return reinterpret_cast<Piece<S>*>(shared + shape.operands) + operand * chunks * kWarpSize;
  };
  // [blocks, units, 8]: the cluster's shares of the product of step n.
  const auto sums_of = [&](int64_t n, int tile) {
    return reinterpret_cast<float*>(shared + shape.sums) +
           (tile * 2 + n % 2) * kBlocks * kGridUnits * kTileColumns;
  };
  const auto barrier_of = [&](int64_t n, int tile) {
    return reinterpret_cast<uint64_t*>(shared + shape.barriers) + tile * 2 + n % 2;
  };
  // Whether a thread has waited in vain before a barrier of the block: [2].
  const auto failed = [&](int64_t round) -> uint32_t& {
    return reinterpret_cast<uint32_t*>(shared + shape.failed)[round % 2];
  };

  Place p{first_row + seat.tile * kTileColumns + seat.column,
          (int64_t{cluster} * kBlocks + rank) * kGridUnits + seat.own_unit(), 0, 1};
  p.offset = p.row * f.h + p.unit;
  const bool row_there = seat.mine && p.row < f.b, there = row_there && p.unit < f.h;
  const int rows = f.b - first_row < kTiles * kTileColumns ? static_cast<int>(f.b - first_row)
                                                           : kTiles * kTileColumns;

  // Slot: a group of the units of the warp's block of this cluster. k: cluster, gate and unit of
  // the blocks of this rank.
  ResidentWeights<S, kSlots, kHeld> weights;
  {
    const auto first =
        reinterpret_cast<Piece<S>*>(shared) + warp * (chunks - kHeld) * kSlots * kWarpSize;
    weights.template load<M>(
        first, chunks, f.copied == 16, operand_of(0, 0), [&](int chunk, int slot) {
          const int k = (chunk * 4 + lane % 4) * kValues, gate = k / kGridUnits % kGates;
          const int from = k / kGridUnits / kGates;
          const int64_t unit =
              (int64_t{cluster} * kBlocks + warp) * kGridUnits + slot * kSlotRows + lane / 4;
          const int64_t of_gate = (int64_t{from} * kBlocks + rank) * kGridUnits + k % kGridUnits;
          return WeightSource<S>{f.w_hh_t + (unit * kGates + gate) * f.h, of_gate,
                                 unit < f.h && from < clusters ? f.h : 0};
        });
  }
  __syncthreads();
  clear(operand_of(0, 0), int64_t{kTiles} * 2 * chunks * kWarpSize);
  if (threadIdx.x < 2) failed(threadIdx.x) = 0;

  typename Steps::Ahead ahead = {};
  V carried[kStates] = {};
  Entry now = Entry::kNone, after = Entry::kNone;  // of step s, and of the one computed after it
  const auto read_ahead = [&](int64_t s) {
    after = now;
    now = row_there ? timeline.entry(s, p.row) : Entry::kNone;
    if (there) ahead = steps.read_ahead(s, p, carried);
  };
  const auto gates_at = [&](int64_t s) {
    const int64_t gates = timeline.time(s) * f.b * kGates * f.h;
    return StepGradients<S>{f.dgx + gates, f.dgh + gates, nullptr};
  };
  if (there) {
    steps.start_h(p);
    steps.start_others(p);
    for (int64_t s = span.end; s < f.t; ++s) steps.keep_gates(p, {}, gates_at(s));
    for (int64_t s = 0; s < span.begin; ++s) steps.keep_gates(p, {}, gates_at(s));
  }
  if (span.begin < span.end) read_ahead(span.end - 1);
  begin_exchange<kBlocks>(barrier_of(0, 0), kTiles * 2);

  const auto own_word = [&](int64_t n, int gate) {
    const int k = (cluster * kGates + gate) * kGridUnits + seat.own_unit();
    return reinterpret_cast<uint32_t*>(&operand_at(exchanged(n, seat.tile), k, seat.column));
  };
  const int pieces = clusters * kGates * kGridUnits / kValues;  // of a row
  int64_t round = 0;                                            // of the block's barriers
  bool lost = false;
  for (int64_t s = span.end - 1; span.begin < span.end && s >= span.begin - 1 && !lost; --s) {
    const int64_t n = span.end - 1 - s;
    const bool more = s >= span.begin;
    FRNN_ROLLED for (int tile = 0; tile < kTiles; ++tile) {
      const int rest = rows - tile * kTileColumns;
      if (rest <= 0 || lost) break;
      // Rows are sent by fours.
      if (more && threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(barrier_of(n + 1, tile),
                                  kBlocks * kGridUnits * (rest > 4 ? 8 : 4) * sizeof(float));
      }
      typename Steps::Outcome result = {};
      bool came = true;
      const bool finishes = seat.mine && seat.tile == tile;
      if (finishes) {
        V product = 0;
        if (n > 0) {
          came = mbarrier_wait(barrier_of(n, tile), (n - 1) / 2 % 2, patience_at(shape, n));
          came = __ballot_sync(~0u, came) == ~0u;  // a word is of two lanes
          if (!came) failed(round) = 1;
          const float* sums = sums_of(n, tile) + seat.own_unit() * kTileColumns + seat.column;
          FRNN_UNROLL for (int r = 0; r < kBlocks; ++r) {
            product += sums[r * kGridUnits * kTileColumns];
          }
        }
        const typename Steps::OfH of_h = steps.of_h(ahead, carried);
        const V dh = steps.gradient_of_h(there ? after : Entry::kNone, p, product, of_h);
        result = steps.compute(dh, steps.of_cell(ahead, carried));
        steps.cut(now, result);
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) carried[j] = result.carried[j];
        FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
          // A NaN of a unit that is not there would come back, times 0.
          const V dgate = p.unit < f.h ? result.dgh[gate] : V(0);
          const uint32_t word = word_of(M::operand(static_cast<S>(dgate)));
          if (more && came && row_there && stores_word<S>(lane)) {
            store_relaxed(own_word(n, gate), word);
          }
        }
      }
      if (!more) continue;

      // Orders what was emptied before this step, and what was polled, too.
      fence_gpu();
      if (finishes && there) {
        steps.keep_gates(p, result, gates_at(s));
        if (now == Entry::kInitial) steps.template keep_carried<false>(s, p, result);
      }
      // Of the rows that are there.
      Piece<S>* const operand = operand_of(n, tile);
      constexpr int kAtOnce = 2;
      for (int first = threadIdx.x; first < pieces * kTileColumns;
           first += kAtOnce * kGridThreads) {
        const uint4* from[kAtOnce];
        uint4 v[kAtOnce];
        uint32_t needed = 0;
        FRNN_UNROLL for (int i = 0; i < kAtOnce; ++i) {
          const int place = first + i * kGridThreads;
          const int column = place % 8 ^ place / 8 % 4 * 2;
          if (place < pieces * kTileColumns && column < rest) needed |= 1u << i;
          from[i] = reinterpret_cast<const uint4*>(exchanged(n, tile) + place);
        }
        if (came && !receive(from, needed, v, patience_at(shape, n))) {
          came = false;
          failed(round) = 1;
        }
        FRNN_UNROLL for (int i = 0; i < kAtOnce; ++i) {
          if (needed >> i & 1) {
            *reinterpret_cast<uint4*>(operand + first + i * kGridThreads) = v[i];
          }
        }
      }
      __syncthreads();
      lost = failed(round++) != 0;
      if (lost) break;
      ResidentProduct<M, kSlots, kHeld> product;
      product.run(weights, chunks, from_shared<kHeld>(operand, chunks));
      float* const to = sums_of(n + 1, tile) + (rank * kGridUnits + lane / 4) * kTileColumns;
      send_sums(product, 0, to, to + kSlotRows * kTileColumns, warp, rest, barrier_of(n + 1, tile));

      if (finishes) {
        if (n > 0 && row_there && stores_word<S>(lane)) {
          FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
            store_relaxed(own_word(n - 1, gate), kEmpty);
          }
        }
        read_ahead(s - 1);
      }
    }
  }

  __syncthreads();
  if (failed(0) != 0 || failed(1) != 0) {
    give_up(error, f.b, f.h, 2);
    if (there) steps.spoil(p, f.dgx, f.dgh);
  }
  // Nobody leaves while others may still send here.
  cluster_arrive();
  cluster_wait();
#endif
}

}  // namespace frnn::cuda
