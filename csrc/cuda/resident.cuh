// SPDX-License-Identifier: Apache-2.0
// What kernels that run all steps have in common: weights that stay in registers and shared memory,
// and their product with an operand of eight rows.
#pragma once

#include "cuda/product.cuh"
#include "steps.h"

namespace frnn::cuda {

// The steps at which any row that a kernel owns is computed.
struct Span {
  int64_t begin, end;
};
template <class S, class RowAt>
__device__ __forceinline__ Span span_of(const Timeline<S>& timeline, const SequenceArgs<S>& args,
                                        int rows, const RowAt& row_at) {
  if (timeline.full()) return {0, args.t};
  int64_t longest = 0;
  for (int i = 0; i < rows && row_at(i) < args.b; ++i) {
    const int64_t length = timeline.length(row_at(i));
    longest = length > longest ? length : longest;
  }
  return args.reverse ? Span{args.t - longest, args.t} : Span{0, longest};
}

// ---- A warp's weights: kHeld chunks in registers, the others in shared memory.

// The piece at k of a row of size `end`, zeros beyond.
template <class S>
struct WeightSource {
  const S* row;
  int64_t k, end;
};

template <class S, int kSlots, int kHeld>
struct ResidentWeights {
  Piece<S> held[kHeld][kSlots];
  Piece<S>* rest;  // [chunks - kHeld, kSlots, 32]

  // source(chunk, slot) is where the lane's piece of its row of a slot is. Rows are read 16 bytes
  // at a time if they are `aligned`, else value by value through a place in shared memory: values
  // that end up in registers all at once would take more of them than there are.
  template <class M, class Source>
  __device__ __forceinline__ void load(Piece<S>* shared, int chunks, bool aligned,
                                       Piece<S>* scratch, const Source& source) {
    rest = shared + threadIdx.x % kWarpSize;
    if (aligned) {
      load_by<M>(chunks, source, [](const WeightSource<S>& from) {
        return from.k < from.end ? read_piece(reinterpret_cast<const Piece<S>*>(from.row + from.k))
                                 : Piece<S>{};
      });
    } else {
      load_by<M>(chunks, source, [scratch](const WeightSource<S>& from) {
        Piece<S>* const piece = scratch + threadIdx.x;
        FRNN_ROLLED for (int i = 0; i < Piece<S>::kValues; ++i) {
          piece->v[i] = from.k + i < from.end ? from.row[from.k + i] : S{};
        }
        return read_piece(piece);
      });
    }
  }

 private:
  template <class M, class Source, class Read>
  __device__ __forceinline__ void load_by(int chunks, const Source& source, const Read& read) {
    FRNN_UNROLL for (int c = 0; c < kHeld; ++c) {
      FRNN_UNROLL for (int slot = 0; slot < kSlots; ++slot) {
        held[c][slot] = operand<M>(read(source(c, slot)));
      }
    }
    FRNN_ROLLED for (int c = kHeld; c < chunks; ++c) {
      FRNN_UNROLL for (int slot = 0; slot < kSlots; ++slot) {
        rest[((c - kHeld) * kSlots + slot) * kWarpSize] = operand<M>(read(source(c, slot)));
      }
    }
  }
};

// The sums of kSlots slots over all chunks of an operand of eight rows. Few slots are summed in
// several parts, since an instruction waits for the one before on the same sums.
template <class M, int kSlots, int kHeld>
struct ResidentProduct {
  using S = typename M::S;
  static constexpr int kParts = kSlots >= 8 ? 1 : kSlots >= 4 ? 2 : 4;
  static constexpr int kBatch = kHeld % 4 == 0 ? 4 : kHeld;  // chunks of the operand at a time
  typename M::template Sums<kSlots, 1> parts[kParts];

  // fetch(first, b) gets the pieces of kBatch chunks from `first` on, anything for those from
  // `chunks` on; the first kHeld chunks are there in any case.
  template <class Fetch>
  __device__ __forceinline__ void run(const ResidentWeights<S, kSlots, kHeld>& weights, int chunks,
                                      const Fetch& fetch) {
    Piece<S> b[kBatch][1];
    FRNN_UNROLL for (int first = 0; first < kHeld; first += kBatch) {
      fetch(first, b);
      FRNN_UNROLL for (int c = 0; c < kBatch; ++c) {
        parts[(first + c) % kParts].add(weights.held[first + c], 0, b[c]);
      }
    }
    const Piece<S>* rest = weights.rest;
    FRNN_ROLLED for (int first = kHeld; first < chunks; first += kBatch) {
      fetch(first, b);
      FRNN_UNROLL for (int c = 0; c < kBatch; ++c) {
        if (first + c >= chunks) break;
        Piece<S> a[kSlots];
        FRNN_UNROLL for (int slot = 0; slot < kSlots; ++slot) {
          a[slot] = read_piece(rest + slot * kWarpSize);
        }
        rest += kSlots * kWarpSize;
        parts[c % kParts].add(a, 0, b[c]);
      }
    }
  }
  __device__ __forceinline__ float get(int slot, int column) const {
    float sum = parts[0].get(slot, 0, column);
    FRNN_UNROLL for (int i = 1; i < kParts; ++i) sum += parts[i].get(slot, 0, column);
    return sum;
  }
};

// An operand is eight rows of k, in pieces: all of a row's q-th pieces of four lie together, and in
// an order that spreads over the banks what a warp writes, pieces or single values, and what it
// reads, lane (g, q) the q-th piece of row g.
__device__ __forceinline__ int lane_in_chunk() {
  const int g = threadIdx.x % kWarpSize / 4, q = threadIdx.x % 4;
  return q * 8 + (g ^ 2 * q);
}

// Value k of row `column` of an operand.
template <class S>
__device__ __forceinline__ S& operand_at(Piece<S>* operand, int k, int column) {
  constexpr int kValues = Piece<S>::kValues;
  const int piece = k / kValues;
  return operand[piece * 8 + (column ^ piece % 4 * 2)].v[k % kValues];
}

template <class T>
__device__ __forceinline__ void clear(T* array, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) array[i] = T{};
}

// Fetches the pieces of an operand that lies in shared memory.
template <int kHeld, class S>
__device__ __forceinline__ auto from_shared(const Piece<S>* operand, int chunks) {
  operand += lane_in_chunk();
  return [operand, chunks](int first, auto& b) {
    FRNN_UNROLL for (int c = 0; c < static_cast<int>(sizeof(b) / sizeof(b[0])); ++c) {
      if (first < kHeld || first + c < chunks)
        b[c][0] = read_piece(operand + (first + c) * kWarpSize);
    }
  };
}

// Initialised mbarriers, seen by all that will use them; and all shared memory written before.
template <int kBlocks>
__device__ __forceinline__ void begin_exchange(uint64_t* barriers, int n) {
#if FRNN_HAVE_CLUSTER
  if constexpr (kBlocks > 1) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < n; ++i) mbarrier_init(barriers + i, 1);
      fence_mbarrier_init();
    }
    fence_proxy_async();
    cluster_arrive();
    cluster_wait();
  }
#endif
  __syncthreads();
}

#if FRNN_HAVE_CLUSTER
// Sends the sums of two slots to shared memory of blocks of the cluster: a lane with an even number
// its unit's sums of the first slot to `even`, one with an odd number those of the second to `odd`,
// in the block `rank`; places of column 0. A lane has four columns after its neighbour's two have
// come to its own, and sends them if one of them is of a row that is there.
template <class Product>
__device__ __forceinline__ void send_sums(const Product& sums, int slot, float* even, float* odd,
                                          int rank, int64_t rows, uint64_t* barrier) {
  const int lane = threadIdx.x % kWarpSize, second = lane % 2, column = lane % 4 / 2 * 4;
  uint32_t mine[2], other[2];
  FRNN_UNROLL for (int j = 0; j < 2; ++j) {
    const float a = sums.get(slot, j), b = sums.get(slot + 1, j);
    mine[j] = __builtin_bit_cast(uint32_t, second ? b : a);
    other[j] = __shfl_xor_sync(~0u, __builtin_bit_cast(uint32_t, second ? a : b), 1);
  }
  const uint4 four = second ? uint4{other[0], other[1], mine[0], mine[1]}
                            : uint4{mine[0], mine[1], other[0], other[1]};
  if (column < rows) {
    store_async(map_rank((second ? odd : even) + column, rank), four, map_rank(barrier, rank));
  }
}
#endif

}  // namespace frnn::cuda
