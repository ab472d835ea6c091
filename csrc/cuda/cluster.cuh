// SPDX-License-Identifier: Apache-2.0
// The cluster algorithm: one kernel runs all steps. A cluster of blocks owns a few rows from
// beginning to end, and its registers and shared memory all of W_hh; clusters know nothing of each
// other. Where they do not all run at once, rows are dealt to them by length: those that run later
// have the short ones, so that none is waited for that long rows would have made as long as theirs.
//
// A block owns some units with all their gates. In forward its product with h is of all units of
// the cluster, and what its units become goes to every block. In backward its product with the
// gradient of its own gates is of all units, and each block is sent its units' share, which it adds
// up in a fixed order. What is sent arrives in shared memory by st.async, which an mbarrier counts;
// there are two buffers of everything, and no other barrier between blocks:
//
//   Data of step n + 2 is sent by a warp that has all of step n + 1 of its peers, and they sent
//   that after they had read step n.
//
// A single block needs no exchange, and its warps meet at the block's barrier.
#pragma once

#include "cuda/kernels.h"
#include "cuda/resident.cuh"

namespace frnn::cuda {

constexpr int kClusterThreads = kMostWarps * kWarpSize;

template <class Cell, int kBlocks, int kTiles, bool kBackward>
struct ClusterSizes {
  static constexpr int kGroups = cluster_groups(Cell::kGates, kBlocks, kBackward);
  static constexpr int kSlots = cluster_slots(Cell::kGates, kBlocks, kBackward);
  static constexpr int kHeld = cluster_held(Cell::kGates, kBlocks, kTiles, kBackward);
  static constexpr int kResults = kGroups * 2;  // of a lane and tile
};

// ---- Where a thread is: lane (g, q) of a warp owns unit g of each of its groups, at the columns
// 2q and 2q + 1 of each of its cluster's tiles.

template <int kBlocks, int kGroups, int kTiles>
struct Seat {
  int lane, warp, rank, units;  // of the block, a warp and rank being numbers in block and cluster
  int side, first;              // of the cluster, and of all rows in turn its first one's number
  const int* own_rows;          // in shared memory, of its first tile

  __device__ __forceinline__ explicit Seat(const ClusterShape& shape)
      : lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize),
        rank(blockIdx.x % kBlocks),
        units(shape.units),
        side(static_cast<int>(blockIdx.x) >= shape.clusters * kBlocks),
        first((static_cast<int>(blockIdx.x) / kBlocks - side * shape.clusters) * kTiles *
              kTileColumns) {}

  // Deals the rows of a batch to the clusters, in order or by length; `rows` [kTiles * 8] is where
  // they are known to all of a block.
  template <class S>
  __device__ __forceinline__ void deal(const Timeline<S>& timeline, const SequenceArgs<S>& args,
                                       bool by_length, int* rows) {
    constexpr int kRows = kTiles * kTileColumns;
    const int all = static_cast<int>(args.b), thread = static_cast<int>(threadIdx.x);
    if (by_length) {
      for (int r = thread; r < all; r += static_cast<int>(blockDim.x)) {
        const int64_t length = timeline.length(r);
        int place = -first;
        for (int other = 0; other < all; ++other) {
          const int64_t n = timeline.length(other);
          place += n > length || (n == length && other < r);
        }
        if (place >= 0 && place < kRows) rows[place] = r;
      }
    }
    if (thread < kRows && (!by_length || first + thread >= all)) rows[thread] = first + thread;
    __syncthreads();
    own_rows = rows + lane % 4 * 2;
  }

  // The unit of a group, within the block and within the cluster.
  __device__ __forceinline__ int own_unit(int group) const {
    return (warp * kGroups + group) * kSlotRows + lane / 4;
  }
  __device__ __forceinline__ int64_t unit(int group) const {
    return int64_t{rank} * units + own_unit(group);
  }
  // The row of a result i of a tile, which is less than 2 * kGroups; none from the last one on.
  __device__ __forceinline__ int64_t row_at(int tile, int i) const {
    return own_rows[tile * kTileColumns + i % 2];
  }
  // The place of a result; false: outside.
  __device__ __forceinline__ bool find(int tile, int i, int64_t rows, int64_t all, Place& p) const {
    p.row = row_at(tile, i);
    p.unit = unit(i / 2);
    p.offset = p.row * all + p.unit;
    p.n = 1;
    return p.row < rows && p.unit < all;
  }
  // How many rows a tile has.
  __device__ __forceinline__ int rows_of(int tile, int64_t rows) const {
    const int rest = static_cast<int>(rows) - first - tile * kTileColumns;
    return rest < kTileColumns ? (rest > 0 ? rest : 0) : kTileColumns;
  }
};

// ---- Forward.

template <class Cell, class M, int kBlocks, int kTiles>
__global__ void __launch_bounds__(kClusterThreads, 1)
    forward_cluster(const __grid_constant__ Sides<Forward<typename M::S, typename M::V>> sides,
                    const __grid_constant__ ClusterShape shape) {
#if FRNN_HAVE_CLUSTER
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = ForwardSteps<Cell, V, S, typename M::V>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates;
  using Sizes = ClusterSizes<Cell, kBlocks, kTiles, false>;
  constexpr int kGroups = Sizes::kGroups, kSlots = Sizes::kSlots, kHeld = Sizes::kHeld;
  constexpr int kResults = Sizes::kResults, kValues = Piece<S>::kValues;
  FRNN_DYN_SMEM(shared);
  Seat<kBlocks, kGroups, kTiles> seat(shape);
  const auto& f = sides.of[seat.side];
  const int chunks = shape.chunks;
  const auto h_of = [&](int tile, int64_t n) {
    return reinterpret_cast<Piece<S>*>(shared) + (tile * 2 + n % 2) * chunks * kWarpSize;
  };
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + shape.barriers);
  const Steps steps(f, nullptr, nullptr, nullptr);
  const Timeline<S>& timeline = steps.timeline();
  int* const rows_here = reinterpret_cast<int*>(shared + shape.rows);
  seat.deal(timeline, f, shape.deals && f.lengths != nullptr, rows_here);
  const Span span =
      span_of(timeline, f, kTiles * kTileColumns, [&](int i) { return int64_t{rows_here[i]}; });

  ResidentWeights<S, kSlots, kHeld> weights;
  {
    const auto first = reinterpret_cast<Piece<S>*>(shared + shape.weights) +
                       seat.warp * (chunks - kHeld) * kSlots * kWarpSize;
    weights.template load<M>(first, chunks, f.copied == 16, h_of(0, 0), [&](int chunk, int slot) {
      const int64_t unit = seat.unit(slot / kGates);
      const int64_t k = (chunk * 4 + seat.lane % 4) * kValues;
      return WeightSource<S>{f.w_hh + (slot % kGates * f.h + unit) * f.h, k, unit < f.h ? f.h : 0};
    });
  }

  // What enters the first step.
  __syncthreads();
  clear(h_of(0, 0), int64_t{kTiles} * 2 * chunks * kWarpSize);
  __syncthreads();
  const int64_t initial = int64_t{kTiles} * kTileColumns * f.h;
  for (int64_t i = threadIdx.x; i < initial; i += blockDim.x) {
    const int column = static_cast<int>(i / f.h);
    const Place p = place<1>(rows_here[column], i % f.h, f.h);
    if (p.row >= f.b) break;
    const V h = steps.entering(timeline.entry(span.begin, p.row), p, 0, V(0));
    operand_at(h_of(column / kTileColumns, 0), static_cast<int>(p.unit), column % kTileColumns) =
        M::operand(static_cast<S>(h));
  }
  typename Steps::Inputs bias[kGroups] = {};
  V state[kTiles][kResults][kStates] = {};
  S gx[kTiles][kResults][kGates] = {};
  Entry now[kTiles][2] = {}, next[kTiles][2] = {};  // of step s, and of the one after it
  const auto each = [&](int tile, const auto& body) {
    FRNN_UNROLL for (int i = 0; i < kResults; ++i) {
      Place p;
      if (seat.find(tile, i, f.b, f.h, p)) body(i, p);
    }
  };
  const auto entries = [&](int64_t s, int tile, Entry(&of)[2]) {
    FRNN_UNROLL for (int j = 0; j < 2; ++j) {
      const int64_t row = seat.row_at(tile, j);
      of[j] = row < f.b ? timeline.entry(s, row) : Entry::kNone;
    }
  };
  const auto read_ahead = [&](int64_t s, int tile) {
    if (!timeline.full()) {
      FRNN_UNROLL for (int j = 0; j < 2; ++j) now[tile][j] = next[tile][j];
      entries(s + 1, tile, next[tile]);
    }
    each(tile, [&](int i, const Place& p) {
      const S* row = f.gx + (timeline.time(s) * f.b + p.row) * kGates * f.h + p.unit;
      FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) gx[tile][i][gate] = row[gate * f.h];
    });
  };
  FRNN_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
    each(tile, [&](int i, const Place& p) {
      steps.start_h(p);
      steps.start_others(p);
      for (int j = 0; j < kStates; ++j) {
        state[tile][i][j] = steps.entering(timeline.entry(span.begin, p.row), p, j, V(0));
      }
      steps.read_of_units(p, bias[i / 2]);
      for (int64_t s = 0; s < span.begin; ++s) steps.template keep<false>(s, p, {});
    });
    entries(span.begin, tile, next[tile]);
    if (span.begin < span.end) read_ahead(span.begin, tile);
  }
  begin_exchange<kBlocks>(barriers, kTiles * 2);

  for (int64_t s = span.begin; s < span.end; ++s) {
    const int64_t n = s - span.begin;
    const bool plain = timeline.full() && s + 1 < f.t, more = s + 1 < span.end;
    FRNN_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
      const int rows = seat.rows_of(tile, f.b);
      if (rows == 0) break;
      uint64_t* const arrival = barriers + tile * 2 + (n + 1) % 2;
      if constexpr (kBlocks == 1) {
        __syncthreads();
      } else {
        if (n > 0) mbarrier_wait(barriers + tile * 2 + n % 2, (n - 1) / 2 % 2);
        if (more && threadIdx.x == 0) {
          mbarrier_arrive_expect_tx(arrival, rows * kBlocks * seat.units * sizeof(S));
        }
      }
      ResidentProduct<M, kSlots, kHeld> product;
      product.run(weights, chunks, from_shared<kHeld>(h_of(tile, n), chunks));

      // Rows and units that are not there take part, up to what they would pass on.
      typename Steps::Outcome result[kResults];
      FRNN_UNROLL for (int i = 0; i < kResults; ++i) {
        V of_x[kGates], of_h[kGates];
        FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
          of_x[gate] = load<V>(&gx[tile][i][gate], 1);
          of_h[gate] = product.get(i / 2 * kGates + gate, i % 2);
        }
        typename Steps::Inputs in = bias[i / 2];
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) in.state[j] = state[tile][i][j];
        result[i] = steps.compute(of_x, of_h, in);
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) state[tile][i][j] = result[i].out[j];
      }
      if (!timeline.full()) {
        each(tile, [&](int i, const Place& p) {
          if (now[tile][i % 2] == Entry::kNone) result[i] = {};
          FRNN_UNROLL for (int j = 0; j < kStates; ++j) {
            state[tile][i][j] = steps.entering(next[tile][i % 2], p, j, result[i].out[j]);
          }
        });
      }
      S h[kResults];
      FRNN_UNROLL for (int i = 0; i < kResults; ++i) {
        h[i] = static_cast<S>(state[tile][i][0]);
        state[tile][i][0] = static_cast<V>(h[i]);
        if (seat.unit(i / 2) >= f.h) h[i] = S{};  // or a NaN would come back, times 0
      }

      if (more) {
        Piece<S>* const to = h_of(tile, n + 1);
        if constexpr (kBlocks == 1) {
          FRNN_UNROLL for (int i = 0; i < kResults; ++i) {
            operand_at(to, seat.own_unit(i / 2), seat.lane % 4 * 2 + i % 2) = M::operand(h[i]);
          }
        } else {
          // A row of eight units of each group, in pieces of 16 bytes.
          constexpr int kOfRow = kSlotRows / kValues, kPieces = kGroups * kTileColumns * kOfRow;
          const auto stage =
              reinterpret_cast<Piece<S>*>(shared + shape.exchange) + seat.warp * kPieces;
          FRNN_UNROLL for (int i = 0; i < kResults; ++i) {
            const int column = i / 2 * kTileColumns + seat.lane % 4 * 2 + i % 2;
            const int unit = seat.lane / 4;
            stage[column * kOfRow + unit / kValues].v[unit % kValues] = M::operand(h[i]);
          }
          __syncwarp();
          FRNN_UNROLL for (int i = 0; i < kPieces * kBlocks; i += kWarpSize) {
            const int piece = (i + seat.lane) % kPieces;
            const int to_rank = ((i + seat.lane) / kPieces + seat.rank) % kBlocks;
            const int column = piece / kOfRow % kTileColumns;
            const int group = piece / kOfRow / kTileColumns;
            const int unit = seat.rank * seat.units + (seat.warp * kGroups + group) * kSlotRows +
                             piece % kOfRow * kValues;
            const uint4 value = *reinterpret_cast<const uint4*>(stage + piece);
            if (column < rows) {
              store_async(map_rank(&operand_at(to, unit, column), to_rank), value,
                          map_rank(arrival, to_rank));
            }
          }
          __syncwarp();
        }
      }
      if (more) read_ahead(s + 1, tile);
      each(tile, [&](int i, const Place& p) {
        if (plain) {
          steps.template keep<true>(s, p, result[i]);
        } else {
          steps.template keep<false>(s, p, result[i]);
        }
      });
    }
  }

  FRNN_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
    each(tile, [&](int, const Place& p) {
      for (int64_t s = span.end; s < f.t; ++s) steps.template keep<false>(s, p, {});
    });
  }
#endif
}

// ---- Backward.

template <class Cell, class M, int kBlocks, int kTiles>
__global__ void __launch_bounds__(kClusterThreads, 1)
    backward_cluster(const __grid_constant__ Sides<Backward<typename M::S, typename M::V>> sides,
                     const __grid_constant__ ClusterShape shape) {
#if FRNN_HAVE_CLUSTER
  using S = typename M::S;
  using V = typename M::Real;
  using Steps = BackwardSteps<Cell, V, S, typename M::V>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates;
  using Sizes = ClusterSizes<Cell, kBlocks, kTiles, true>;
  constexpr int kGroups = Sizes::kGroups, kSlots = Sizes::kSlots, kHeld = Sizes::kHeld;
  constexpr int kResults = Sizes::kResults, kValues = Piece<S>::kValues;
  FRNN_DYN_SMEM(shared);
  Seat<kBlocks, kGroups, kTiles> seat(shape);
  const auto& f = sides.of[seat.side];
  const int chunks = shape.chunks, units = shape.units;
  const auto dgates_of = [&](int tile, int64_t n) {
    const int64_t operand = tile * shape.operands + (n & (shape.operands - 1));
    return reinterpret_cast<Piece<S>*>(shared) + operand * chunks * kWarpSize;
  };
  // [blocks, units, 8]: each block's share of the product of step n.
  const auto sums_of = [&](int tile, int64_t n) {
    return reinterpret_cast<float*>(shared + shape.exchange) +
           (tile * 2 + n % 2) * kBlocks * units * kTileColumns;
  };
  const auto barrier_of = [&](int tile, int64_t n) {
    return reinterpret_cast<uint64_t*>(shared + shape.barriers) + (tile * 2 + n % 2) * shape.warps +
           seat.warp;
  };
  const Steps steps(f);
  const Timeline<S>& timeline = steps.timeline();
  int* const rows_here = reinterpret_cast<int*>(shared + shape.rows);
  seat.deal(timeline, f, shape.deals && f.lengths != nullptr, rows_here);
  const Span span =
      span_of(timeline, f, kTiles * kTileColumns, [&](int i) { return int64_t{rows_here[i]}; });

  ResidentWeights<S, kSlots, kHeld> weights;
  {
    const auto first = reinterpret_cast<Piece<S>*>(shared + shape.weights) +
                       seat.warp * (chunks - kHeld) * kSlots * kWarpSize;
    // Slot (rank, group): a unit of another block; k: gate and unit of this one.
    const auto unit = [&](int slot) {
      return int64_t{slot / kGroups} * units + seat.own_unit(slot % kGroups);
    };
    weights.template load<M>(
        first, chunks, f.copied == 16, dgates_of(0, 0), [&](int chunk, int slot) {
          const int k = (chunk * 4 + seat.lane % 4) * kValues, gate = k / units;
          const int64_t of_gate = int64_t{seat.rank} * units + k % units;
          return WeightSource<S>{f.w_hh_t + (unit(slot) * kGates + gate) * f.h, of_gate,
                                 unit(slot) < f.h && gate < kGates ? f.h : 0};
        });
  }
  __syncthreads();
  clear(dgates_of(0, 0), int64_t{kTiles} * shape.operands * chunks * kWarpSize);

  typename Steps::Ahead ahead[kTiles][kResults] = {};
  V carried[kTiles][kResults][kStates] = {}, product[kTiles][kResults] = {};
  Entry now[kTiles][2] = {}, after[kTiles][2] = {};  // of step s, and of the one computed after it
  const auto each = [&](int tile, const auto& body) {
    FRNN_UNROLL for (int i = 0; i < kResults; ++i) {
      Place p;
      if (seat.find(tile, i, f.b, f.h, p)) body(i, p);
    }
  };
  // Of step s, once step s + 1 is done; carried is what that left.
  const auto read_ahead = [&](int64_t s, int tile) {
    FRNN_UNROLL for (int j = 0; j < 2; ++j) {
      const int64_t row = seat.row_at(tile, j);
      after[tile][j] = now[tile][j];
      now[tile][j] = row < f.b ? timeline.entry(s, row) : Entry::kNone;
    }
    each(tile,
         [&](int i, const Place& p) { ahead[tile][i] = steps.read_ahead(s, p, carried[tile][i]); });
  };
  const auto gates_at = [&](int64_t s) {
    const int64_t gates = timeline.time(s) * f.b * kGates * f.h;
    return StepGradients<S>{f.dgx + gates, f.dgh + gates, nullptr};
  };
  const auto skip = [&](int64_t s, const Place& p) { steps.keep_gates(p, {}, gates_at(s)); };
  FRNN_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
    each(tile, [&](int, const Place& p) {
      steps.start_h(p);
      steps.start_others(p);
      for (int64_t s = span.end; s < f.t; ++s) skip(s, p);
      for (int64_t s = 0; s < span.begin; ++s) skip(s, p);
    });
    if (span.begin < span.end) read_ahead(span.end - 1, tile);
  }
  begin_exchange<kBlocks>(barrier_of(0, 0) - seat.warp, kTiles * 2 * shape.warps);
  if (span.begin == span.end) return;

  for (int64_t s = span.end - 1; s >= span.begin - 1; --s) {
    const int64_t n = span.end - 1 - s;
    const bool more = s >= span.begin;
    FRNN_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
      const int rows = seat.rows_of(tile, f.b);
      if (rows == 0) break;
      if constexpr (kBlocks > 1) {
        if (n > 0) {
          mbarrier_wait(barrier_of(tile, n), (n - 1) / 2 % 2);
          FRNN_UNROLL for (int i = 0; i < kResults; ++i) {
            const float* sums =
                sums_of(tile, n) + seat.own_unit(i / 2) * kTileColumns + seat.lane % 4 * 2 + i % 2;
            product[tile][i] = 0;
            FRNN_UNROLL for (int r = 0; r < kBlocks; ++r) {
              product[tile][i] += sums[r * units * kTileColumns];
            }
          }
        }
        // Rows are sent by fours.
        if (more && seat.lane == 0) {
          const int bytes = kBlocks * kSlotRows * (rows > 4 ? 8 : 4) * static_cast<int>(sizeof(V));
          mbarrier_arrive_expect_tx(barrier_of(tile, n + 1), bytes);
        }
      }

      // Rows and units that are not there take part, up to what they would pass on.
      typename Steps::Outcome result[kResults];
      FRNN_UNROLL for (int i = 0; i < kResults; ++i) {
        const typename Steps::OfH of_h = steps.of_h(ahead[tile][i], carried[tile][i]);
        const Entry next = after[tile][i % 2];
        V dh = product[tile][i] + of_h.last + of_h.dy;
        if (Cell::kReadsH) dh += of_h.carried;
        if (next != Entry::kCarried) {
          Place p;
          const bool there = seat.find(tile, i, f.b, f.h, p);
          dh = steps.gradient_of_h(there ? next : Entry::kNone, p, product[tile][i], of_h);
        }
        result[i] = steps.compute(dh, steps.of_cell(ahead[tile][i], carried[tile][i]));
        steps.cut(now[tile][i % 2], result[i]);
        FRNN_UNROLL for (int j = 0; j < kStates; ++j) carried[tile][i][j] = result[i].carried[j];
      }
      if (!more) continue;

      FRNN_UNROLL for (int i = 0; i < kResults; ++i) {
        FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
          const V dgate = seat.unit(i / 2) < f.h ? result[i].dgh[gate] : V(0);
          operand_at(dgates_of(tile, n), gate * units + seat.own_unit(i / 2),
                     seat.lane % 4 * 2 + i % 2) = M::operand(static_cast<S>(dgate));
        }
      }
      __syncthreads();
      ResidentProduct<M, kSlots, kHeld> sums;
      sums.run(weights, chunks, from_shared<kHeld>(dgates_of(tile, n), chunks));
      if (shape.operands == 1) __syncthreads();
      if constexpr (kBlocks == 1) {
        FRNN_UNROLL for (int i = 0; i < kResults; ++i) product[tile][i] = sums.get(i / 2, i % 2);
      } else {
        float* const to =
            sums_of(tile, n + 1) + (seat.rank * units + seat.own_unit(0)) * kTileColumns;
        FRNN_UNROLL for (int slot = 0; slot < kSlots; slot += 2) {
          send_sums(sums, slot, to, to, slot + seat.lane % 2, rows, barrier_of(tile, n + 1));
        }
      }
      const Entry entered[2] = {now[tile][0], now[tile][1]};
      read_ahead(s - 1, tile);
      each(tile, [&](int i, const Place& p) {
        steps.keep_gates(p, result[i], gates_at(s));
        if (entered[i % 2] == Entry::kInitial) steps.template keep_carried<false>(s, p, result[i]);
      });
    }
  }
#endif
}

}  // namespace frnn::cuda
