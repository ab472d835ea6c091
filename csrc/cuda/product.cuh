// SPDX-License-Identifier: Apache-2.0
// The product of a few rows of states with a few rows of weights, both contiguous along k, and the
// arithmetic it is made in.
//
// A warp copies its operands to shared memory as the tensor cores want them: lane (g, q) =
// (lane / 4, lane % 4) copies 16 bytes of row g, the q-th of four consecutive pieces. The order of
// k within these 64 bytes is of no account as long as both operands follow it, so that one such
// piece feeds two instructions. Copies are asynchronous, several rounds ahead, those of the weights
// even before the step before has ended; no warp waits for another until they add up their shares
// of k.
//
// Rows of weights come in *slots* of eight, one row for each g. A lane ends with the sums of its
// rows g of every slot at columns 2q and 2q + 1 of every tile of eight columns. Giving the gates of
// eight units a slot each therefore puts all gates of a unit into one thread.
#pragma once

#include <type_traits>

#include "cuda/approximate.h"
#include "cuda/plan.h"
#include "cuda/primitives.h"

namespace frnn::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarps = 4;  // of a block; each takes every fourth piece of k

// 16 bytes of a row.
template <class S>
struct alignas(16) Piece {
  static constexpr int kValues = 16 / sizeof(S);
  S v[kValues];
};

// Piece at k of a row of size k_end; zeros beyond its end.
template <class S>
__device__ __forceinline__ Piece<S> load_piece(const S* row, int64_t k, int64_t k_end) {
  Piece<S> piece = {};
  for (int i = 0; i < Piece<S>::kValues; ++i) {
    if (k + i < k_end) piece.v[i] = row[k + i];
  }
  return piece;
}

// The same to shared memory, in the background, by parts of kBytes, which divide the row.
template <int kBytes, class S>
__device__ __forceinline__ void copy_parts(Piece<S>* to, const S* row, int64_t k, int64_t k_end) {
  constexpr int kValues = kBytes / static_cast<int>(sizeof(S));
  if constexpr (kValues > 0) {
    FRNN_UNROLL for (int i = 0; i < Piece<S>::kValues; i += kValues) {
      cp_async<kBytes>(to->v + i, row + k + i, k + i < k_end ? kBytes : 0);
    }
  }
}

// By one instruction.
template <class S>
__device__ __forceinline__ Piece<S> read_piece(const Piece<S>* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return __builtin_bit_cast(Piece<S>, v);
}

// For a product in the arithmetic M.
template <class M, class S>
__device__ __forceinline__ Piece<S> operand(Piece<S> piece) {
  FRNN_UNROLL for (int i = 0; i < Piece<S>::kValues; ++i) piece.v[i] = M::operand(piece.v[i]);
  return piece;
}

// ---- Arithmetics: the type S of storage, V of sums and states, and Real which cells compute in;
// what becomes of a value that enters a product, and the sums of kSlots slots and kTiles tiles of
// such values. kColumns is how many columns of a tile a lane must be given the pieces of: one, g,
// or all eight.

// As m16n8 instructions leave them: two slots each.
template <int kSlots, int kTiles>
struct PairSums {
  static_assert(kSlots % 2 == 0, "an instruction takes two slots");
  float d[kSlots / 2][kTiles][4] = {};

  __device__ __forceinline__ float get(int slot, int tile, int column) const {
    return d[slot / 2][tile][slot % 2 * 2 + column];
  }
  __device__ __forceinline__ void finish() {}
};

template <class S>
struct AsItIs {
  __device__ __forceinline__ static S operand(S x) { return x; }
};

// 16-bit storage, sums in fp32.
template <class S_>
struct Half : AsItIs<S_> {
  using S = S_;
  using V = float;
  using Real = Approximate;
  static constexpr Arithmetic kArithmetic =
      std::is_same_v<S, __half> ? Arithmetic::kFloat16 : Arithmetic::kBfloat16;
  static constexpr int kColumns = 1;

  template <int kSlots, int kTiles>
  struct Sums : PairSums<kSlots, kTiles> {
    __device__ __forceinline__ void add(const Piece<S> (&a)[kSlots], int n,
                                        const Piece<S> (&b)[1]) {
      const uint32_t* b0 = reinterpret_cast<const uint32_t*>(&b[0]);
      FRNN_UNROLL for (int s = 0; s < kSlots; s += 2) {
        const uint32_t* a0 = reinterpret_cast<const uint32_t*>(&a[s]);
        const uint32_t* a1 = reinterpret_cast<const uint32_t*>(&a[s + 1]);
        FRNN_UNROLL for (int i = 0; i < 4; i += 2) {
          const uint32_t x[4] = {a0[i], a1[i], a0[i + 1], a1[i + 1]}, y[2] = {b0[i], b0[i + 1]};
          if constexpr (std::is_same_v<S, __half>) {
            mma_f16(this->d[s / 2][n], x, y);
          } else {
            mma_bf16(this->d[s / 2][n], x, y);
          }
        }
      }
    }
  };
};

// float with operands rounded to 10 bits.
struct Tf32 {
  using S = float;
  using V = float;
  using Real = Approximate;
  static constexpr Arithmetic kArithmetic = Arithmetic::kTf32;
  static constexpr int kColumns = 1;
  __device__ __forceinline__ static float operand(float x) {
    return __builtin_bit_cast(float, to_tf32(x));
  }

  template <int kSlots, int kTiles>
  struct Sums : PairSums<kSlots, kTiles> {
    __device__ __forceinline__ void add(const Piece<S> (&a)[kSlots], int n,
                                        const Piece<S> (&b)[1]) {
      const uint32_t* b0 = reinterpret_cast<const uint32_t*>(&b[0]);
      FRNN_UNROLL for (int s = 0; s < kSlots; s += 2) {
        const uint32_t* a0 = reinterpret_cast<const uint32_t*>(&a[s]);
        const uint32_t* a1 = reinterpret_cast<const uint32_t*>(&a[s + 1]);
        FRNN_UNROLL for (int i = 0; i < 4; i += 2) {
          const uint32_t x[4] = {a0[i], a1[i], a0[i + 1], a1[i + 1]}, y[2] = {b0[i], b0[i + 1]};
          mma_tf32(this->d[s / 2][n], x, y);
        }
      }
    }
  };
};

struct Fp64 : AsItIs<double> {
  using S = double;
  using V = double;
  using Real = double;
  static constexpr Arithmetic kArithmetic = Arithmetic::kFloat64;
  static constexpr int kColumns = 1;

  template <int kSlots, int kTiles>
  struct Sums {
    double d[kSlots][kTiles][2] = {};

    __device__ __forceinline__ void add(const Piece<S> (&a)[kSlots], int n,
                                        const Piece<S> (&b)[1]) {
      FRNN_UNROLL for (int s = 0; s < kSlots; ++s) {
        FRNN_UNROLL for (int i = 0; i < 2; ++i) mma_f64(d[s][n], a[s].v[i], b[0].v[i]);
      }
    }
    __device__ __forceinline__ double get(int slot, int tile, int column) const {
      return d[slot][tile][column];
    }
    __device__ __forceinline__ void finish() {}
  };
};

// IEEE float without tensor cores: a lane forms its k's share of all eight columns, and the four
// lanes of a row add their shares at the end.
struct Fp32 : AsItIs<float> {
  using S = float;
  using V = float;
  using Real = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::kFloat32;
  static constexpr int kColumns = kTileColumns;

  template <int kSlots, int kTiles>
  struct Sums {
    float d[kSlots][kTiles][kTileColumns] = {};

    __device__ __forceinline__ void add(const Piece<S> (&a)[kSlots], int n,
                                        const Piece<S> (&b)[kTileColumns]) {
      FRNN_UNROLL for (int c = 0; c < kTileColumns; ++c) {
        FRNN_UNROLL for (int s = 0; s < kSlots; ++s) {
          FRNN_UNROLL for (int i = 0; i < 4; ++i) d[s][n][c] += a[s].v[i] * b[c].v[i];
        }
      }
    }
    // Lane q sends away the columns of other lanes, half of them and then a quarter.
    __device__ __forceinline__ void finish() {
      const int q = threadIdx.x % 4;
      FRNN_UNROLL for (int s = 0; s < kSlots; ++s) {
        FRNN_UNROLL for (int n = 0; n < kTiles; ++n) {
          float (&x)[kTileColumns] = d[s][n];
          FRNN_UNROLL for (int c = 0; c < 4; ++c) {
            const float keep = q & 2 ? x[c + 4] : x[c], give = q & 2 ? x[c] : x[c + 4];
            x[c] = keep + __shfl_xor_sync(~0u, give, 2);
          }
          FRNN_UNROLL for (int c = 0; c < 2; ++c) {
            const float keep = q & 1 ? x[c + 2] : x[c], give = q & 1 ? x[c] : x[c + 2];
            x[c] = keep + __shfl_xor_sync(~0u, give, 1);
          }
        }
      }
    }
    __device__ __forceinline__ float get(int slot, int tile, int column) const {
      return d[slot][tile][column];
    }
  };
};

// ---- The product of a block.

// A place among the results of a lane: unit g of a group of eight, column 2q + j of a tile.
struct Result {
  int group, tile, j;
};

// Divides kGroups x kTiles x 2 results among the warps.
template <int kGroups, int kTiles>
struct Share {
  static constexpr int kAll = kGroups * kTiles * 2, kEach = (kAll + kWarps - 1) / kWarps;

  // The i-th result of this warp, if there is one.
  __device__ __forceinline__ static bool get(int i, Result& result) {
    const int index = static_cast<int>(threadIdx.x) / kWarpSize + i * kWarps;
    result = {index / 2 / kTiles, index / 2 % kTiles, index % 2};
    return index < kAll;
  }
};

// Shared memory of a block: of each warp a ring of stages, one for each round of k on its way or in
// use, and afterwards its sums.
template <class M, int kGates, int kGroups, int kTiles>
struct Memory {
  static constexpr int kSlots = kGates * kGroups, kPieces = kSlots + kTiles;  // of a lane and round
  static constexpr int kStageBytes = kPieces * kWarpSize * 16;
  // What an SM of compute capability 9.0 or 10.0 holds twice: of this step's block, and of the next
  // one's, which copies its weights meanwhile. A few others, such as 8.6, hold it once.
  static constexpr int kMostBytes = 96 * 1024;
  static constexpr int kFit = kMostBytes / (kWarps * kStageBytes);
  static constexpr int kStages = kFit < 16 ? kFit : 16;
  static_assert(kStages >= 2);
  static constexpr int kSumBytes = kSlots * kTiles * 2 * kWarpSize * sizeof(typename M::V);
  static constexpr int kWarpBytes =
      kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kBytes = kWarps * kWarpBytes;
  static_assert(kBytes <= 99 * 1024, "more than a block may have on 8.6, 8.9 and 12.0");
};

// One factor of a product, as rows that are contiguous along k: those of a lane are row +
// offset(i), unless bit i of `there` is clear, which stands for zeros.
template <class S, class Offset>
struct Factor {
  const S* row;
  uint32_t there;
  Offset offset;
};
template <class S, class Offset>
Factor(const S*, uint32_t, Offset) -> Factor<S, Offset>;

// sum over k of weights[k] * rows[k], for each slot (group by group, gate by gate) of weights and
// each tile of rows. before() runs ahead of the first read of `rows`, after() when the registers of
// the product are free again; done(i, result, sums[kGates]) takes a lane's results, the same lane
// those of the same i and result. Sums are added in an order that depends on the shape alone. Rows
// are copied 16, 8 or 4 bytes at a time, which divide their size and addresses, or, if `copied` is
// 0, value by value and without running ahead.
template <class M, int kGates, int kGroups, int kTiles, class Weights, class Rows, class Before,
          class After, class Done>
__device__ __forceinline__ void product(int64_t k_end, int copied, const Weights& weights,
                                        const Rows& rows, const Before& before, const After& after,
                                        const Done& done) {
  using S = typename M::S;
  using V = typename M::V;
  using Own = Memory<M, kGates, kGroups, kTiles>;
  constexpr int kSlots = Own::kSlots, kStages = Own::kStages;
  constexpr int kStep = kWarps * 4 * Piece<S>::kValues;  // of k in a round
  FRNN_DYN_SMEM(shared);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto ring = reinterpret_cast<Piece<S>*>(shared + warp * Own::kWarpBytes);
  const auto place = [&](int round, int piece, int of) {
    return ring + (round % kStages * Own::kPieces + piece) * kWarpSize + of;
  };

  const int rounds = static_cast<int>((k_end + kStep - 1) / kStep);
  // A factor's pieces of a round, to the places from `first` on.
  const auto fetch = [&](int round, int first, int count, const auto& factor) {
    if (round >= rounds) return;
    const int64_t k = int64_t{round} * kStep + (warp * 4 + lane % 4) * Piece<S>::kValues;
    if (copied == 16) {
      const uint32_t there = k < k_end ? factor.there : 0;
      const S* from = factor.row + k;
      FRNN_UNROLL for (int i = 0; i < count; ++i) {
        cp_async<16>(place(round, first + i, lane), from + factor.offset(i),
                     there >> i & 1 ? 16 : 0);
      }
      return;
    }
    FRNN_ROLLED for (int i = 0; i < count; ++i) {
      const S* row = factor.row + factor.offset(i);
      const int64_t end = factor.there >> i & 1 ? k_end : 0;
      Piece<S>* to = place(round, first + i, lane);
      if (copied == 8) {
        copy_parts<8>(to, row, k, end);
      } else if (copied == 4) {
        copy_parts<4>(to, row, k, end);
      } else {
        *to = load_piece(row, k, end);
      }
    }
  };
  const auto fetch_weights = [&](int round) { fetch(round, 0, kSlots, weights); };
  const auto fetch_rows = [&](int round) {
    fetch(round, kSlots, kTiles, rows);
    cp_async_commit();  // a group of each round, an empty one too
  };

  for (int round = 0; round < kStages - 1; ++round) fetch_weights(round);
  before();
  for (int round = 0; round < kStages - 1; ++round) fetch_rows(round);
  typename M::template Sums<kSlots, kTiles> sums;
  for (int round = 0; round < rounds; ++round) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // this round has come for all lanes, and all have read the one before
    fetch_weights(round + kStages - 1);
    fetch_rows(round + kStages - 1);
    Piece<S> a[kSlots];
    FRNN_UNROLL for (int slot = 0; slot < kSlots; ++slot) a[slot] =
        operand<M>(read_piece(place(round, slot, lane)));
    FRNN_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
      Piece<S> b[M::kColumns];
      FRNN_UNROLL for (int c = 0; c < M::kColumns; ++c) {
        b[c] = operand<M>(
            read_piece(place(round, kSlots + tile, M::kColumns == 1 ? lane : c * 4 + lane % 4)));
      }
      sums.add(a, tile, b);
    }
  }
  sums.finish();

  const auto at = [&](int w, int slot, int tile, int j) -> V& {
    const auto sums_of_warp = reinterpret_cast<V*>(shared + w * Own::kWarpBytes);
    return sums_of_warp[((slot * kTiles + tile) * 2 + j) * kWarpSize + lane];
  };
  __syncwarp();
  FRNN_UNROLL for (int slot = 0; slot < kSlots; ++slot) {
    FRNN_UNROLL for (int n = 0; n < kTiles; ++n) {
      FRNN_UNROLL for (int j = 0; j < 2; ++j) at(warp, slot, n, j) = sums.get(slot, n, j);
    }
  }
  after();
  __syncthreads();
  using Mine = Share<kGroups, kTiles>;
  FRNN_UNROLL for (int i = 0; i < Mine::kEach; ++i) {
    Result result;
    if (!Mine::get(i, result)) break;
    typename M::Real total[kGates];
    FRNN_UNROLL for (int gate = 0; gate < kGates; ++gate) {
      V sum = 0;
      FRNN_UNROLL for (int w = 0; w < kWarps; ++w) {
        sum += at(w, result.group * kGates + gate, result.tile, result.j);
      }
      total[gate] = sum;
    }
    done(i, result, total);
  }
}

}  // namespace frnn::cuda
