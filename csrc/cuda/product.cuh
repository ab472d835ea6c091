// SPDX-License-Identifier: Apache-2.0
// The product of a few rows of states with a few rows of weights, both contiguous along k, and the
// arithmetic it is made in.
//
// A warp holds its operands as the tensor cores want them, straight from global memory: lane
// (g, q) = (lane / 4, lane % 4) loads 16 bytes of row g, the q-th of four consecutive pieces. The
// order of k within these 64 bytes is of no account as long as both operands follow it, so that one
// such load feeds two instructions. Weights are used once a block; staging them in shared memory
// would only delay them.
//
// Rows of weights come in *slots* of eight, one row for each g. A lane ends with the sums of its
// rows g of every slot at columns 2q and 2q + 1 of every tile of eight columns. Giving the gates of
// eight units a slot each therefore puts all gates of a unit into one thread.
#pragma once

#include <type_traits>

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

// Piece at k of a row of size k_end; zeros beyond its end and of a row that is not there.
template <class S>
__device__ __forceinline__ Piece<S> load_piece(const S* row, int64_t k, int64_t k_end,
                                               bool aligned) {
  Piece<S> piece = {};
  if (row == nullptr || k >= k_end) return piece;
  if (aligned) return *reinterpret_cast<const Piece<S>*>(row + k);
  for (int i = 0; i < Piece<S>::kValues; ++i) {
    if (k + i < k_end) piece.v[i] = row[k + i];
  }
  return piece;
}

// ---- Arithmetics: the type of storage, that of sums and states, and the sums of kSlots slots and
// kTiles tiles. kColumns is how many columns of a tile a lane must be given the pieces of: one, g,
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

// 16-bit storage, sums in fp32.
template <class S_>
struct Half {
  using S = S_;
  using V = float;
  static constexpr int kColumns = 1, kMostTiles = 4;

  template <int kSlots, int kTiles>
  struct Sums : PairSums<kSlots, kTiles> {
    __device__ __forceinline__ void add(const Piece<S> (&a)[kSlots], const Piece<S>* b) {
      for (int s = 0; s < kSlots; s += 2) {
        const uint32_t* a0 = reinterpret_cast<const uint32_t*>(&a[s]);
        const uint32_t* a1 = reinterpret_cast<const uint32_t*>(&a[s + 1]);
        for (int n = 0; n < kTiles; ++n) {
          const uint32_t* b0 = reinterpret_cast<const uint32_t*>(&b[n]);
          for (int i = 0; i < 4; i += 2) {
            const uint32_t x[4] = {a0[i], a1[i], a0[i + 1], a1[i + 1]}, y[2] = {b0[i], b0[i + 1]};
            if constexpr (std::is_same_v<S, __half>) {
              mma_f16(this->d[s / 2][n], x, y);
            } else {
              mma_bf16(this->d[s / 2][n], x, y);
            }
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
  static constexpr int kColumns = 1, kMostTiles = 4;

  template <int kSlots, int kTiles>
  struct Sums : PairSums<kSlots, kTiles> {
    __device__ __forceinline__ void add(const Piece<S> (&a)[kSlots], const Piece<S>* b) {
      for (int s = 0; s < kSlots; s += 2) {
        for (int i = 0; i < 4; i += 2) {
          const uint32_t x[4] = {to_tf32(a[s].v[i]), to_tf32(a[s + 1].v[i]), to_tf32(a[s].v[i + 1]),
                                 to_tf32(a[s + 1].v[i + 1])};
          for (int n = 0; n < kTiles; ++n) {
            const uint32_t y[2] = {to_tf32(b[n].v[i]), to_tf32(b[n].v[i + 1])};
            mma_tf32(this->d[s / 2][n], x, y);
          }
        }
      }
    }
  };
};

struct Fp64 {
  using S = double;
  using V = double;
  static constexpr int kColumns = 1, kMostTiles = 2;

  template <int kSlots, int kTiles>
  struct Sums {
    double d[kSlots][kTiles][2] = {};

    __device__ __forceinline__ void add(const Piece<S> (&a)[kSlots], const Piece<S>* b) {
      for (int s = 0; s < kSlots; ++s) {
        for (int n = 0; n < kTiles; ++n) {
          for (int i = 0; i < 2; ++i) mma_f64(d[s][n], a[s].v[i], b[n].v[i]);
        }
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
struct Fp32 {
  using S = float;
  using V = float;
  static constexpr int kColumns = kTileColumns, kMostTiles = 1;  // two tiles spill

  template <int kSlots, int kTiles>
  struct Sums {
    float d[kSlots][kTiles][kTileColumns] = {};

    __device__ __forceinline__ void add(const Piece<S> (&a)[kSlots], const Piece<S>* b) {
      for (int n = 0; n < kTiles; ++n) {
        for (int c = 0; c < kTileColumns; ++c) {
          for (int s = 0; s < kSlots; ++s) {
            for (int i = 0; i < 4; ++i) d[s][n][c] += a[s].v[i] * b[n * kTileColumns + c].v[i];
          }
        }
      }
    }
    // Lane q sends away the columns of other lanes, half of them and then a quarter.
    __device__ __forceinline__ void finish() {
      const int q = threadIdx.x % 4;
      for (int s = 0; s < kSlots; ++s) {
        for (int n = 0; n < kTiles; ++n) {
          float (&x)[kTileColumns] = d[s][n];
          for (int c = 0; c < 4; ++c) {
            const float keep = q & 2 ? x[c + 4] : x[c], give = q & 2 ? x[c] : x[c + 4];
            x[c] = keep + __shfl_xor_sync(~0u, give, 2);
          }
          for (int c = 0; c < 2; ++c) {
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

// sum over k of weights(group, gate)[k] * rows(column)[k]: weights gives the row of a lane's unit,
// rows that of a column of the block, or null. before() runs ahead of the first read of `rows`;
// done(i, result, sums[kGates]) takes a lane's results, the same lane those of the same i and
// result. Sums are added in an order that depends on the shape alone.
template <class M, int kGates, int kGroups, int kTiles, class Weights, class Rows, class Before,
          class Done>
__device__ __forceinline__ void product(int64_t k_end, bool aligned, const Weights& weights,
                                        const Rows& rows, const Before& before, const Done& done) {
  using S = typename M::S;
  using V = typename M::V;
  constexpr int kSlots = kGates * kGroups, kPieces = kTiles * M::kColumns;
  FRNN_SHARED(V, partial, kWarps * kSlots * kTiles * 2 * kWarpSize);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, q = lane % 4;
  constexpr int kStep = kWarps * 4 * Piece<S>::kValues;

  const auto load_weights = [&](Piece<S>(&a)[kSlots], int64_t k) {
    for (int slot = 0; slot < kSlots; ++slot) {
      a[slot] = load_piece(weights(slot / kGates, slot % kGates), k, k_end, aligned);
    }
  };
  const auto load_rows = [&](Piece<S>(&b)[kPieces], int64_t k) {
    for (int i = 0; i < kPieces; ++i) {
      const int column = M::kColumns == 1 ? i * kTileColumns + g : i;
      b[i] = load_piece(rows(column), k, k_end, aligned);
    }
  };

  typename M::template Sums<kSlots, kTiles> sums;
  Piece<S> a[kSlots], b[kPieces];
  int64_t k = (warp * 4 + q) * Piece<S>::kValues;
  load_weights(a, k);
  before();
  load_rows(b, k);
  // All lanes of a warp take part in every round, those beyond the end with zeros.
  for (int64_t round = 0; round < k_end; round += kStep) {
    Piece<S> next_a[kSlots], next_b[kPieces];
    k += kStep;
    load_weights(next_a, k);
    load_rows(next_b, k);
    sums.add(a, b);
    for (int i = 0; i < kSlots; ++i) a[i] = next_a[i];
    for (int i = 0; i < kPieces; ++i) b[i] = next_b[i];
  }
  sums.finish();

  const auto at = [&](int w, int slot, int tile, int j) -> V& {
    return partial[(((w * kSlots + slot) * kTiles + tile) * 2 + j) * kWarpSize + lane];
  };
  for (int slot = 0; slot < kSlots; ++slot) {
    for (int n = 0; n < kTiles; ++n) {
      for (int j = 0; j < 2; ++j) at(warp, slot, n, j) = sums.get(slot, n, j);
    }
  }
  __syncthreads();
  using Mine = Share<kGroups, kTiles>;
  for (int i = 0; i < Mine::kEach; ++i) {
    Result result;
    if (!Mine::get(i, result)) break;
    V total[kGates];
    for (int gate = 0; gate < kGates; ++gate) {
      total[gate] = V(0);
      for (int w = 0; w < kWarps; ++w) {
        total[gate] += at(w, result.group * kGates + gate, result.tile, result.j);
      }
    }
    done(i, result, total);
  }
}

}  // namespace frnn::cuda
