// SPDX-License-Identifier: Apache-2.0
// The grid algorithm: one kernel runs all steps, for weights that only many blocks can hold. A team
// of blocks owns a few rows and W_hh; all blocks of all teams are resident at once.
//
// A block owns sixteen units with all their gates, and gives each of its warps a share of k. What
// its units become goes through global memory to every block of the team, in the layout in which it
// is multiplied, and the data is its own flag: a word is kEmpty until it has come. h of a tile has
// four slots that take turns. At step n, once a block has all of a tile's h_n:
//
//   every block has published it, hence left step n - 1, hence read all of h_{n-1}: its owner
//   empties that slot. A fence orders it before h_{n+2}, which its readers will have seen, and
//   passed a fence, before they look there for h_{n+3}.
//
// So a thread passes a fence after it has emptied a tile's h_{n-1} and before it publishes h_{n+2},
// and after it has received h_n and before its first look for h_{n+1}.
//
// In backward the blocks of a team are clusters of eight. Of what a step's gates become, a block
// gathers that of one block of each cluster, the one with its own rank in it, and multiplies it
// with the weights to the 128 units of its cluster, whose blocks each add up their share as those
// of the cluster algorithm do. So a block reads an eighth of what all gates become.
//
// Where a team has several tiles they take turns, so that what one sends is under way while others
// are multiplied; a turn of one tile is a round. In forward that is one trip a step. In backward it
// is two, from a step's gates to its product and from there to the step before, so that in round i
// a block finishes one tile and multiplies what it finished in round i - tiles / 2, or in this one
// if there are no others. What it waits for others have sent in rounds before, or in this one
// before they wait themselves.
//
// Nobody waits for ever: a block that waits too long says so in the error words and leaves, and
// what it should have returned is NaN.
#pragma once

#include "cuda/kernels.h"
#include "cuda/resident.cuh"

namespace frnn::cuda {

constexpr int kGridThreads = kGridWarps * kWarpSize;
constexpr uint32_t kEmpty = 0xffffffffu;  // never a value: rounding leaves other NaNs

// Half of a block's warps have a result of each even tile for each lane, the others of each odd
// one; so one half may go on while the other finishes a tile.
struct GridSeat {
  static_assert(kGridGroups * 2 * 2 == kGridWarps);
  int lane, warp, half, unit, column;  // unit of the block

  __device__ __forceinline__ GridSeat()
      : lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize),
        half(warp / (kGridWarps / 2)),
        unit(warp / 2 % kGridGroups * kSlotRows + lane / 4),
        column(lane % 4 * 2 + warp % 2) {}

  __device__ __forceinline__ bool owns(int tile) const { return tile % 2 == half; }
};

// What a thread carries of its tiles from step to step, in shared memory: [(tiles + 1) / 2, kN].
template <class V, class A, int kN>
class GridStates {
  static_assert(kN <= kMostStates && sizeof(A) == 4, "more than GridShape has room for");

 public:
  __device__ __forceinline__ explicit GridStates(unsigned char* shared)
      : own_(reinterpret_cast<A*>(shared) + threadIdx.x) {}

  __device__ __forceinline__ V load(int tile, int j) const {
    return frnn::load<V>(own_ + (tile / 2 * kN + j) * kGridThreads, 1);
  }
  __device__ __forceinline__ void store(int tile, int j, V x) const {
    frnn::store(own_ + (tile / 2 * kN + j) * kGridThreads, x, 1);
  }

 private:
  A* const own_;
};

template <class Cell, bool kBackward>
struct GridSizes {
  static constexpr int kSlots = kBackward ? kGridGroups : grid_slots(Cell::kGates);
  static constexpr int kHeld = grid_held(Cell::kGates, kBackward);
};

// A block's team, of all those of both sides, and its rows: tiles of eight from `first_row` on.
struct GridTeam {
  int number, side, first_row;

  __device__ __forceinline__ explicit GridTeam(const GridShape& shape)
      : number(blockIdx.x / shape.blocks),
        side(number >= shape.teams),
        first_row((number - side * shape.teams) * shape.tiles * kTileColumns) {}

  // How many tiles have rows.
  __device__ __forceinline__ int tiles(const GridShape& shape, int64_t rows) const {
    const int64_t rest = (rows - first_row + kTileColumns - 1) / kTileColumns;
    return rest < shape.tiles ? static_cast<int>(rest) : shape.tiles;
  }
};

// Where the results of a thread belong: of each tile that it owns one, of the same unit.
template <class S>
struct GridPlaces {
  const SequenceArgs<S>& args;
  GridSeat seat;
  int first_row, unit;

  __device__ __forceinline__ Place at(int tile) const {
    const int64_t row = first_row + tile * kTileColumns + seat.column;
    return {row, unit, row * args.h + unit, 1};
  }
  __device__ __forceinline__ bool has_row(const Place& p) const { return p.row < args.b; }
  __device__ __forceinline__ bool has(const Place& p) const {
    return p.row < args.b && p.unit < args.h;
  }
  template <class Body>
  __device__ __forceinline__ void each(int tiles, const Body& body) const {
    FRNN_ROLLED for (int tile = seat.half; tile < tiles; tile += 2) body(tile, at(tile));
  }
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

// Whether all words of a piece have come.
__device__ __forceinline__ bool has_come(const uint4& v) {
  return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty;
}

// The pieces that are `needed` (by bit), as they are now.
template <int kN>
__device__ __forceinline__ void ask(const uint4* const (&from)[kN], uint32_t needed,
                                    uint4 (&v)[kN]) {
  FRNN_UNROLL for (int i = 0; i < kN; ++i) {
    if (needed >> i & 1) v[i] = load_relaxed(from[i]);
  }
}

// Asks for pieces again until all that are needed have come; false if that takes too long.
template <int kN>
__device__ __forceinline__ bool receive(const uint4* const (&from)[kN], uint32_t needed,
                                        uint4 (&v)[kN], int64_t patience) {
  const uint64_t start = cycles();
  for (;;) {
    bool all = true;
    FRNN_UNROLL for (int i = 0; i < kN; ++i) {
      if (needed >> i & 1) all = all && has_come(v[i]);
    }
    if (all) return true;
    if (static_cast<int64_t>(cycles() - start) > patience) return false;
    ask(from, needed, v);
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

template <class Cell, class M>
__global__ void __launch_bounds__(kGridThreads, 1)
    forward_grid(const __grid_constant__ Sides<Forward<typename M::S, typename M::V>> sides,
                 const __grid_constant__ GridShape shape, uint32_t* error) {
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = ForwardSteps<Cell, V, S, typename M::V>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kValues = Piece<S>::kValues;
  using Sizes = GridSizes<Cell, false>;
  constexpr int kSlots = Sizes::kSlots, kHeld = Sizes::kHeld;
  using Product = ResidentProduct<M, kSlots, kHeld>;
  constexpr int kBatch = Product::kBatch;
  FRNN_DYN_SMEM(shared);
  const GridSeat seat;
  const int lane = seat.lane, warp = seat.warp;
  const GridTeam team(shape);
  const int rank = blockIdx.x % shape.blocks, first_row = team.first_row;
  const auto& f = sides.of[team.side];
  const int tiles = team.tiles(shape, f.b);
  const int each = shape.each, chunks = shape.chunks;  // of k: of a warp, of all
  const Steps steps(f, nullptr, nullptr, nullptr);
  const Timeline<S>& timeline = steps.timeline();
  const Span span =
      span_of(timeline, f, tiles * kTileColumns, [&](int i) { return int64_t{first_row + i}; });

  // h of the team: [4, tiles, chunks, 32].
  const auto h_of = [&](int n, int tile) {
    const int operand =
        (team.number * kExchangeSlots + (n & (kExchangeSlots - 1))) * shape.tiles + tile;
    return static_cast<Piece<S>*>(sides.exchange) + int64_t{operand} * (chunks * kWarpSize);
  };
  // The warps' sums of a round: [2, kGridWarps, kSlots, 2, 32].
  const auto sums_of = [&](int round, int w, int slot, int j) -> float& {
    float* const sums = reinterpret_cast<float*>(shared + shape.sums);
    return sums[(((round % 2 * kGridWarps + w) * kSlots + slot) * 2 + j) * kWarpSize + lane];
  };
  // Whether a thread has waited in vain in a round: [2].
  const auto failed = [&](int round) -> uint32_t& {
    return reinterpret_cast<uint32_t*>(shared + shape.failed)[round % 2];
  };

  const int begin = static_cast<int>(span.begin), end = static_cast<int>(span.end);

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

  const int team_unit = rank * kGridUnits + seat.unit;
  const auto own_word = [&](int n, int tile) {
    return reinterpret_cast<uint32_t*>(&operand_at(h_of(n, tile), team_unit, seat.column));
  };
  const auto publish = [&](int n, int tile, bool row_there, V h) {
    // A NaN of a unit that is not there would come back, times 0.
    const uint32_t word = word_of(M::operand(static_cast<S>(team_unit < f.h ? h : V(0))));
    if (row_there && stores_word<S>(lane)) store_relaxed(own_word(n, tile), word);
  };

  const GridPlaces<S> places{f, seat, first_row, team_unit};
  const GridStates<V, typename M::V, kStates> states(shared + shape.states);

  // What the thread's next result is made of beside the product.
  typename Steps::Inputs in = {};
  S gx[kGates] = {};
  Entry now = Entry::kNone, next = Entry::kNone;  // of its step, and of the one after it
  const auto read_ahead = [&](int n, int tile) {
    const int64_t s = begin + n;
    const Place p = places.at(tile);
    if (!places.has(p) || s >= end) return;
    now = timeline.entry(s, p.row);
    next = timeline.entry(s + 1, p.row);
    const S* row = f.gx + (timeline.time(s) * f.b + p.row) * kGates * f.h + p.unit;
    FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) gx[gate] = row[gate * f.h];
  };
  if (team_unit < f.h) steps.read_of_units(places.at(0), in);
  places.each(tiles, [&](int tile, const Place& p) {
    V state[kStates] = {};
    if (places.has(p)) {
      steps.start_h(p);
      steps.start_others(p);
      const Entry entry = timeline.entry(begin, p.row);
      for (int j = 0; j < kStates; ++j) state[j] = steps.entering(entry, p, j, V(0));
      for (int64_t s = 0; s < begin; ++s) steps.template keep<false>(s, p, {});
    }
    FRNN_UNROLL for (int j = 0; j < kStates; ++j) states.store(tile, j, state[j]);
    if (begin < end) publish(0, tile, places.has_row(p), state[0]);
  });
  if (seat.half < tiles) read_ahead(0, seat.half);
  if (threadIdx.x < 2) failed(threadIdx.x) = 0;
  __syncthreads();

  // The warp's pieces of an operand, of which those of rows and units that are there come at all.
  const int first_piece = warp * each * 4, all_pieces = shape.blocks * kGridUnits / kValues;
  const int end_piece = first_piece + each * 4 < all_pieces ? first_piece + each * 4 : all_pieces;
  const auto pieces_of = [&](int n, int tile, int first, const uint4*(&from)[kBatch]) {
    const Piece<S>* const h = h_of(n, tile) + (warp * each + first) * kWarpSize + lane_in_chunk();
    const int end = first_row + tile * kTileColumns + lane / 4 < f.b ? end_piece : 0;
    uint32_t needed = 0;
    FRNN_UNROLL for (int c = 0; c < kBatch; ++c) {
      from[c] = reinterpret_cast<const uint4*>(h + c * kWarpSize);
      if (first_piece + (first + c) * 4 + lane % 4 < end) needed |= 1u << c;
    }
    return needed;
  };
  uint4 early[kBatch] = {};  // the first pieces of the next round, if they have come
  const auto ask_early = [&](int n, int tile) {
    const uint4* from[kBatch];
    const uint32_t needed = pieces_of(n, tile, 0, from);
    FRNN_UNROLL for (int c = 0; c < kBatch; ++c) early[c] = {};
    ask(from, needed, early);
  };
  if (begin < end) ask_early(0, 0);

  // Of many tiles the next one's h has been on its way for a while when a tile is finished.
  const bool many = tiles > 2;
  int round = 0;
  bool lost = false;
  FRNN_ROLLED for (int n = 0; begin + n < end && !lost; ++n) {
    const int s = begin + n;
    const bool plain = timeline.full() && s + 1 < f.t, more = s + 1 < end;
    FRNN_ROLLED for (int tile = 0; tile < tiles; ++tile, ++round) {
      const bool last = tile + 1 == tiles;
      bool came = true;
      Product product;
      product.run(weights, each, [&](int first, auto& b) {
        const uint4* from[kBatch];
        uint4 v[kBatch] = {};
        const uint32_t needed = pieces_of(n, tile, first, from);
        if (first == 0) {
          FRNN_UNROLL for (int c = 0; c < kBatch; ++c) v[c] = early[c];
        } else {
          ask(from, needed, v);
        }
        if (came && !receive(from, needed, v, patience_at(shape, n))) {
          came = false;
          failed(round) = 1;
        }
        FRNN_UNROLL for (int c = 0; c < kBatch; ++c) b[c][0] = __builtin_bit_cast(Piece<S>, v[c]);
      });
      FRNN_UNROLL for (int slot = 0; slot < kSlots; ++slot) {
        FRNN_UNROLL for (int j = 0; j < 2; ++j) sums_of(round, warp, slot, j) =
            product.get(slot, j);
      }
      __syncthreads();
      lost = failed(round) != 0;
      if (lost) break;
      const int next_n = n + last;
      const int next_tile = last ? 0 : tile + 1;
      if (many) {
        if (tile == 0) fence_gpu();
        ask_early(next_n, next_tile);
      }

      const bool finishes = seat.owns(tile);
      const Place p = places.at(tile);
      const bool there = places.has(p);
      typename Steps::Outcome result = {};
      if (finishes) {
        V of_x[kGates], of_h[kGates];
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) {
          if (j > 0 || Cell::kReadsH) in.state[j] = states.load(tile, j);
        }
        FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
          of_x[gate] = load<V>(&gx[gate], 1);
          float sum = 0;
          FRNN_UNROLL for (int w = 0; w < kGridWarps; ++w) {
            sum += sums_of(round, w, warp / 2 % kGridGroups * kGates + gate, warp % 2);
          }
          of_h[gate] = sum;
        }
        // Rows and units that are not there take part, up to what they would pass on.
        result = steps.compute(of_x, of_h, in);
        V state[kStates];
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) state[j] = result.out[j];
        if (!plain && there) {
          if (now == Entry::kNone) result = {};
          FRNN_UNROLL for (int j = 0; j < kStates; ++j) {
            state[j] = steps.entering(next, p, j, result.out[j]);
          }
        }
        state[0] = static_cast<V>(static_cast<S>(state[0]));
        if (more) publish(n + 1, tile, places.has_row(p), state[0]);
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) states.store(tile, j, state[j]);
        if (n > 0 && places.has_row(p) && stores_word<S>(lane)) {
          store_relaxed(own_word(n - 1, tile), kEmpty);
        }
      }
      if (!many) {
        if (last) fence_gpu();
        ask_early(next_n, next_tile);
      }
      if (finishes) {
        const int own = tile + 2 < tiles ? tile + 2 : seat.half;
        if (there && plain) {
          steps.template keep<true>(s, p, result);
        } else if (there) {
          steps.template keep<false>(s, p, result);
        }
        read_ahead(n + (own < tile + 2), own);
      }
    }
  }

  if (lost) give_up(error, f.b, f.h, 1);
  places.each(tiles, [&](int, const Place& p) {
    if (!places.has(p)) return;
    if (lost) {
      steps.spoil(p);
    } else {
      for (int64_t s = end; s < f.t; ++s) steps.template keep<false>(s, p, {});
    }
  });
}

// ---- Backward.

template <class Cell, class M>
__global__ void __launch_bounds__(kGridThreads, 1)
    backward_grid(const __grid_constant__ Sides<Backward<typename M::S, typename M::V>> sides,
                  const __grid_constant__ GridShape shape, uint32_t* error) {
#if FRNN_HAVE_CLUSTER
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = BackwardSteps<Cell, V, S, typename M::V>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kValues = Piece<S>::kValues;
  using Sizes = GridSizes<Cell, true>;
  constexpr int kSlots = Sizes::kSlots, kHeld = Sizes::kHeld;
  constexpr int kBlocks = kClusterBlocks;
  static_assert(kBlocks == kGridWarps, "each warp multiplies for a block of the cluster");
  FRNN_DYN_SMEM(shared);
  const GridSeat seat;
  const int lane = seat.lane, warp = seat.warp, chunks = shape.chunks;
  const int clusters = shape.blocks / kBlocks;  // of a team
  const int rank = blockIdx.x % kBlocks, cluster = blockIdx.x / kBlocks % clusters;
  const GridTeam team(shape);
  const int first_row = team.first_row;
  const auto& f = sides.of[team.side];
  const int tiles = team.tiles(shape, f.b);
  const Steps steps(f);
  const Timeline<S>& timeline = steps.timeline();
  const Span span =
      span_of(timeline, f, tiles * kTileColumns, [&](int i) { return int64_t{first_row + i}; });

  // The gates' gradients that blocks of this rank exchange: [4, tiles, 8, chunks, 32] of the team.
  const auto exchanged = [&](int n, int tile) {
    const int all =
        (team.number * kExchangeSlots + (n & (kExchangeSlots - 1))) * shape.tiles + tile;
    return static_cast<Piece<S>*>(sides.exchange) +
           int64_t{all * kBlocks + rank} * (chunks * kWarpSize);
  };
  const auto operand_of = [&](int round) {
    return reinterpret_cast<Piece<S>*>(shared + shape.operands) + round % 2 * chunks * kWarpSize;
  };
  // [blocks, units, 8]: the cluster's shares of the product of step n.
  const auto sums_of = [&](int n, int tile) {
    return reinterpret_cast<float*>(shared + shape.sums) +
           (tile * 2 + (n & 1)) * kBlocks * kGridUnits * kTileColumns;
  };
  const auto barrier_of = [&](int n, int tile) {
    return reinterpret_cast<uint64_t*>(shared + shape.barriers) + tile * 2 + (n & 1);
  };
  // Whether a thread has waited in vain in a round: [2].
  const auto failed = [&](int round) -> uint32_t& {
    return reinterpret_cast<uint32_t*>(shared + shape.failed)[round % 2];
  };

  const int computed = static_cast<int>(span.end - span.begin);

  // Slot: a group of the units of the warp's block of this cluster. k: cluster, gate and unit of
  // the blocks of this rank.
  ResidentWeights<S, kSlots, kHeld> weights;
  {
    const auto first =
        reinterpret_cast<Piece<S>*>(shared) + warp * (chunks - kHeld) * kSlots * kWarpSize;
    weights.template load<M>(
        first, chunks, f.copied == 16, operand_of(0), [&](int chunk, int slot) {
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
  clear(operand_of(0), int64_t{2} * chunks * kWarpSize);
  if (threadIdx.x < 2) failed(threadIdx.x) = 0;

  const GridPlaces<S> places{f, seat, first_row,
                             (cluster * kBlocks + rank) * kGridUnits + seat.unit};
  const GridStates<V, typename M::V, kStates> states(shared + shape.states);

  // What the thread's next result is made of beside the product.
  typename Steps::Ahead ahead = {};
  Entry now = Entry::kNone, after = Entry::kNone;  // of its step, and of the one computed before it
  const auto read_ahead = [&](int64_t s, int tile) {
    const Place p = places.at(tile);
    now = places.has_row(p) ? timeline.entry(s, p.row) : Entry::kNone;
    after = places.has(p) ? timeline.entry(s + 1, p.row) : Entry::kNone;
    if (!places.has(p)) return;
    V carried[kStates];
    FRNN_UNROLL for (int j = 0; j < kStates; ++j) carried[j] = states.load(tile, j);
    ahead = steps.read_ahead(s, p, carried);
    FRNN_UNROLL for (int j = 0; j < kStates; ++j) states.store(tile, j, carried[j]);
  };
  const auto gates_at = [&](int64_t s) {
    const int64_t gates = timeline.time(s) * f.b * kGates * f.h;
    return StepGradients<S>{f.dgx + gates, f.dgh + gates, nullptr};
  };
  places.each(tiles, [&](int tile, const Place& p) {
    FRNN_UNROLL for (int j = 0; j < kStates; ++j) states.store(tile, j, V(0));
    if (!places.has(p)) return;
    steps.start_h(p);
    steps.start_others(p);
    for (int64_t s = span.end; s < f.t; ++s) steps.keep_gates(p, {}, gates_at(s));
    for (int64_t s = 0; s < span.begin; ++s) steps.keep_gates(p, {}, gates_at(s));
  });
  if (computed > 0 && seat.half < tiles) read_ahead(span.end - 1, seat.half);
  begin_exchange<kBlocks>(barrier_of(0, 0), shape.tiles * 2);

  const auto own_word = [&](int n, int tile, int gate) {
    const int k = (cluster * kGates + gate) * kGridUnits + seat.unit;
    return reinterpret_cast<uint32_t*>(&operand_at(exchanged(n, tile), k, seat.column));
  };
  const auto rows_of = [&](int tile) {
    const int64_t rest = f.b - first_row - tile * kTileColumns;
    return rest < kTileColumns ? static_cast<int>(rest) : kTileColumns;
  };
  // The pieces of a tile's operand that a thread copies, of which those of rows that are there
  // come.
  constexpr int kAtOnce = 2;
  const int all_pieces = clusters * kGates * kGridUnits / kValues * kTileColumns;
  const auto pieces_of = [&](int n, int tile, int first, const uint4*(&from)[kAtOnce]) {
    uint32_t needed = 0;
    FRNN_UNROLL for (int i = 0; i < kAtOnce; ++i) {
      const int place = first + i * kGridThreads, column = place % 8 ^ place / 8 % 4 * 2;
      from[i] = reinterpret_cast<const uint4*>(exchanged(n, tile) + place);
      if (place < all_pieces && column < rows_of(tile)) needed |= 1u << i;
    }
    return needed;
  };
  uint4 early[kAtOnce] = {};  // the first pieces of the next operand, if they have come
  const auto ask_early = [&](int n, int tile) {
    const uint4* from[kAtOnce];
    const uint32_t needed = pieces_of(n, tile, threadIdx.x, from);
    ask(from, needed, early);
  };

  // Gathers the gates' gradients of a tile at step n, and sends the cluster its shares of their
  // product. False: somebody waited in vain.
  const auto multiply = [&](int round, int n, int tile, bool came) {
    Piece<S>* const operand = operand_of(round);
    for (int first = threadIdx.x; first < all_pieces; first += kAtOnce * kGridThreads) {
      const uint4* from[kAtOnce];
      const uint32_t needed = pieces_of(n, tile, first, from);
      if (first >= kAtOnce * kGridThreads) ask(from, needed, early);
      if (came && !receive(from, needed, early, patience_at(shape, n))) {
        came = false;
        failed(round) = 1;
      }
      FRNN_UNROLL for (int i = 0; i < kAtOnce; ++i) {
        if (needed >> i & 1) {
          *reinterpret_cast<uint4*>(operand + first + i * kGridThreads) = early[i];
        }
      }
    }
    __syncthreads();
    if (failed(round) != 0) return false;
    ResidentProduct<M, kSlots, kHeld> product;
    product.run(weights, chunks, from_shared<kHeld>(operand, chunks));
    float* const to = sums_of(n + 1, tile) + (rank * kGridUnits + lane / 4) * kTileColumns;
    send_sums(product, 0, to, to + kSlotRows * kTileColumns, warp, rows_of(tile),
              barrier_of(n + 1, tile));
    if (n > 0 && seat.owns(tile) && seat.column < rows_of(tile) && stores_word<S>(lane)) {
      FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
        store_relaxed(own_word(n - 1, tile, gate), kEmpty);
      }
    }
    return true;
  };

  bool lost = false;
  int round = 0, behind = 0;  // behind: the tile that is multiplied, at step m
  int m = 0;
  FRNN_ROLLED for (int n = 0; computed > 0 && n <= computed && !lost; ++n) {
    const int64_t s = span.end - 1 - n;
    const bool more = n < computed;
    FRNN_ROLLED for (int tile = 0; tile < tiles; ++tile, ++round) {
      const int there_are = rows_of(tile);
      // Rows are sent by fours.
      if (more && threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(barrier_of(n + 1, tile),
                                  kBlocks * kGridUnits * (there_are > 4 ? 8 : 4) * sizeof(float));
      }
      typename Steps::Outcome result = {};
      bool came = true;
      const bool finishes = seat.owns(tile);
      const Place p = places.at(tile);
      if (finishes) {
        V product = 0, carried[kStates];
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) carried[j] = states.load(tile, j);
        if (n > 0) {
          came = mbarrier_wait(barrier_of(n, tile), (n - 1) / 2 % 2, patience_at(shape, n));
          came = __ballot_sync(~0u, came) == ~0u;  // a word is of two lanes
          if (!came) failed(round) = 1;
          const float* sums = sums_of(n, tile) + seat.unit * kTileColumns + seat.column;
          FRNN_UNROLL for (int r = 0; r < kBlocks; ++r) {
            product += sums[r * kGridUnits * kTileColumns];
          }
        }
        const typename Steps::OfH of_h = steps.of_h(ahead, carried);
        const V dh = steps.gradient_of_h(after, p, product, of_h);
        result = steps.compute(dh, steps.of_cell(ahead, carried));
        steps.cut(now, result);
        FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
          // A NaN of a unit that is not there would come back, times 0.
          const V dgate = p.unit < f.h ? result.dgh[gate] : V(0);
          const uint32_t word = word_of(M::operand(static_cast<S>(dgate)));
          if (more && came && places.has_row(p) && stores_word<S>(lane)) {
            store_relaxed(own_word(n, tile, gate), word);
          }
        }
      }
      if (tiles == 1) {
        fence_gpu();
        ask_early(n, 0);
      }
      if (finishes && more) {
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) states.store(tile, j, result.carried[j]);
        if (places.has(p)) {
          steps.keep_gates(p, result, gates_at(s));
          if (now == Entry::kInitial) steps.template keep_carried<false>(s, p, result);
        }
      }
      if (round >= tiles / 2 && m < computed) {
        lost = !multiply(round, m, behind, came);
        if (lost) break;
        const bool last = ++behind == tiles;
        if (last) behind = 0;
        m += last;
      }
      if (tiles > 1) {
        if (tile == 0) fence_gpu();
        ask_early(m, behind);
      }
      if (finishes) {
        const int own = tile + 2 < tiles ? tile + 2 : seat.half;
        read_ahead(s - (own < tile + 2), own);
      }
    }
  }

  __syncthreads();
  if (failed(0) != 0 || failed(1) != 0) {
    give_up(error, f.b, f.h, 2);
    places.each(tiles, [&](int, const Place& p) {
      if (places.has(p)) steps.spoil(p, f.dgx, f.dgh);
    });
  }
  // Nobody leaves while others may still send here.
  cluster_arrive();
  cluster_wait();
#endif
}

}  // namespace frnn::cuda
