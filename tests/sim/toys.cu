// SPDX-License-Identifier: Apache-2.0
#include "toys.h"

#include <stdexcept>
#include <vector>

#include "device_array.h"

namespace frnn::toys {
namespace {

using namespace frnn::cuda;

constexpr int kSteps = 6, kBlocks = 4, kThreads = 64, kUnits = 16;  // units of a block
constexpr int kH = kBlocks * kUnits;
constexpr uint32_t kEmpty = 0xffffffffu;

// h' = W h + x on integers, where any stale or torn word changes all that follows.
__host__ __device__ __forceinline__ uint32_t weight(int unit, int k) {
  return static_cast<uint32_t>(unit * 2654435761u) ^ static_cast<uint32_t>(k * 40503u + 1);
}
__host__ __device__ __forceinline__ uint32_t finish(uint32_t sum, uint32_t x) {
  return (sum + x) & 0x7fffffffu;  // never kEmpty
}

struct Arguments {
  uint32_t* h;        // [2, H] or [4, H]; step 0 is in slot 0
  const uint32_t* x;  // [T, H]
  uint32_t* y;        // [T, H]
  uint32_t* counter;
};

// The sum over this thread's quarter of k, for unit threadIdx.x / 4, added over the quarter's
// lanes.
__device__ __forceinline__ uint32_t quarter_sums(const uint32_t* h, int unit) {
  uint32_t sum = 0;
  for (int k = static_cast<int>(threadIdx.x % 4); k < kH; k += 4) sum += weight(unit, k) * h[k];
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

// h through global memory, a counter as the grid barrier.
template <Bug kBug>
__global__ void grid_flag(const __grid_constant__ Arguments a) {
  FRNN_SHARED(uint32_t, h, kH);
  const int tid = static_cast<int>(threadIdx.x);
  const int unit = static_cast<int>(blockIdx.x) * kUnits + tid / 4;
  for (int t = 0; t < kSteps; ++t) {
    const uint32_t* from = a.h + (kBug == Bug::kSingleBuffer ? 0 : t % 2 * kH);
    uint32_t* to = a.h + (kBug == Bug::kSingleBuffer ? 0 : (t + 1) % 2 * kH);
    if (tid < kH / 4) cp_async<16>(h + 4 * tid, from + 4 * tid);
    cp_async_commit();
    if (kBug != Bug::kLateCopyWait) cp_async_wait<0>();
    if (kBug != Bug::kNoSyncAfterCopy) __syncthreads();
    uint32_t sum = 0;
    if (kBug != Bug::kDivergence || tid != 5) sum = quarter_sums(h, unit);
    if (kBug == Bug::kLateCopyWait) cp_async_wait<0>();
    if (tid % 4 == 0) {
      const uint32_t v = finish(sum, a.x[t * kH + unit]);
      to[unit] = v;
      a.y[t * kH + unit] = v;
      if (kBug == Bug::kOutOfBounds) h[kH + unit % 4] = v;
    }
    if (kBug == Bug::kNoBarrier) {
      __syncthreads();
      continue;
    }
    if (kBug != Bug::kNoSyncBeforeRelease) __syncthreads();
    if (tid == 0) {
      const uint32_t all = static_cast<uint32_t>(kBlocks * (t + 1));
      if constexpr (kBug == Bug::kRelaxedFlag) {
        atomicAdd(a.counter, 1u);
        while (load_relaxed(a.counter) < all) {
        }
      } else {
        red_release_add(a.counter, 1);
        while (load_acquire(a.counter) < all) {
        }
      }
    }
    __syncthreads();
  }
}

// The data is the flag: words of four rotating slots, polled until they are not empty.
template <Bug kBug>
__global__ void grid_sentinel(const __grid_constant__ Arguments a) {
  FRNN_SHARED(uint32_t, partial, 2 * kUnits * kThreads);
  FRNN_SHARED(uint32_t, x, 2 * kUnits);
  const int tid = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kUnits;
  auto prefetch = [&](int t) {
    if (tid < kUnits && t < kSteps) {
      cp_async<4>(x + t % 2 * kUnits + tid, a.x + t * kH + first + tid);
    }
    cp_async_commit();
  };
  prefetch(0);
  for (int t = 0; t < kSteps; ++t) {
    prefetch(t + 1);
    const uint32_t* slot = a.h + t % 4 * kH;
    uint32_t* sums = partial + (kBug == Bug::kSingleReduction ? 0 : t % 2 * kUnits * kThreads);
    uint32_t word;  // each thread polls the word of its own k
    while ((word = load_relaxed(slot + tid)) == kEmpty) {
    }
    for (int u = 0; u < kUnits; ++u) sums[u * kThreads + tid] = weight(first + u, tid) * word;
    __syncthreads();
    cp_async_wait<kBug == Bug::kLateCopyWait ? 2 : 1>();
    if (tid < kUnits) {
      uint32_t sum = 0;
      for (int k = 0; k < kThreads; ++k) sum += sums[tid * kThreads + k];
      const uint32_t v = finish(sum, x[t % 2 * kUnits + tid]);
      store_relaxed(a.h + (t + 1) % 4 * kH + first + tid, v);
      a.y[t * kH + first + tid] = v;
      // All of h_t was seen, so all have read h_{t-1}: its slot will take h_{t+3}.
      const int old = t - (kBug == Bug::kEarlyRecycle ? 0 : kBug == Bug::kLateRecycle ? 2 : 1);
      if (old >= 0) store_relaxed(a.h + old % 4 * kH + first + tid, kEmpty);
      if (kBug != Bug::kNoFence) fence_gpu();
    }
  }
  cp_async_wait<0>();
}
static_assert(kThreads == kH, "each thread polls one word");

// h in the shared memory of every block, written there by all, a cluster barrier per step.
template <Bug kBug>
__global__ void cluster_barrier(const __grid_constant__ Arguments a) {
#if FRNN_HAVE_CLUSTER
  FRNN_SHARED(uint32_t, h, 2 * kH);
  const int tid = static_cast<int>(threadIdx.x);
  const int unit = cluster_rank() * kUnits + tid / 4;
  h[tid] = a.h[tid];
  cluster_arrive();
  cluster_wait();
  for (int t = 0; t < kSteps; ++t) {
    const int from = kBug == Bug::kSingleBuffer ? 0 : t % 2,
              to = kBug == Bug::kSingleBuffer ? 0 : 1 - from;
    const uint32_t v = finish(quarter_sums(h + from * kH, unit), a.x[t * kH + unit]);
    const int rank = tid % 4;  // each of the unit's four threads serves one block
    cluster_store(map_rank(h + to * kH + unit, rank), v);
    if (rank == 0) a.y[t * kH + unit] = v;
    if (kBug == Bug::kNoBarrier || (kBug == Bug::kNoLastBarrier && t == kSteps - 1)) continue;
    cluster_arrive();
    cluster_wait();
  }
#endif
}
static_assert(kBlocks == 4);

// The same by st.async, its bytes counted by an mbarrier per buffer; x by bulk copies.
template <Bug kBug>
__global__ void cluster_async(const __grid_constant__ Arguments a) {
#if FRNN_HAVE_CLUSTER
  FRNN_SHARED(uint32_t, h, 2 * kH);
  FRNN_SHARED(uint32_t, x, 2 * kUnits);
  FRNN_SHARED(uint32_t, pair, 2 * kUnits);
  FRNN_SHARED(uint64_t, full, 2);
  FRNN_SHARED(uint64_t, x_full, 2);
  const int tid = static_cast<int>(threadIdx.x), first = cluster_rank() * kUnits;
  constexpr uint32_t kBytes = kH * 4 - (kBug == Bug::kWrongBytes ? 16 : 0);
  auto load_x = [&](int t) {
    mbarrier_arrive_expect_tx(&x_full[t % 2], kUnits * 4);
    bulk_copy(x + t % 2 * kUnits, a.x + t * kH + first, kUnits * 4, &x_full[t % 2]);
  };
  h[tid] = a.h[tid];
  if (tid == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&x_full[i], 1);
    }
    if (kBug != Bug::kNoFence) fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&full[1], kBytes);
    load_x(0);
  }
  cluster_arrive();
  cluster_wait();
  for (int t = 0; t < kSteps; ++t) {
    const int from = kBug == Bug::kSingleBuffer ? 0 : t % 2,
              to = kBug == Bug::kSingleBuffer ? 0 : 1 - t % 2;
    if (t > 0 && kBug != Bug::kNoMbarrierWait) {
      const uint32_t parity = static_cast<uint32_t>((t - 1) / 2 % 2);
      mbarrier_wait(&full[t % 2], kBug == Bug::kWrongParity ? 1 - parity : parity);
    }
    if (tid == 0) {
      if (t + 1 < kSteps) load_x(t + 1);
      // Of the next step but one: armed before anyone can have sent for it all.
      if (t > 0) mbarrier_arrive_expect_tx(&full[1 - t % 2], kBytes);
    }
    // The quarter sums of 16 units, gathered by warp 0: 4 units a lane for st.async of 16 bytes.
    const uint32_t sum = quarter_sums(h + from * kH, first + tid / 4);
    uint32_t* exchange = pair + t % 2 * kUnits;
    if (tid % 4 == 0) exchange[tid / 4] = sum;
    if (kBug != Bug::kNoPairBarrier) bar_sync(1, kThreads);
    if (tid < 32) {
      mbarrier_wait(&x_full[t % 2], static_cast<uint32_t>(t / 2 % 2));
      const int chunk = tid % 4, rank = tid / 4;
      uint32_t v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = finish(exchange[4 * chunk + i], x[t % 2 * kUnits + 4 * chunk + i]);
        if (rank == 0) a.y[t * kH + first + 4 * chunk + i] = v[i];
      }
      __syncwarp();
      if (rank < kBlocks) {
        store_async(map_rank(h + to * kH + first + 4 * chunk, rank), uint4{v[0], v[1], v[2], v[3]},
                    map_rank(&full[1 - t % 2], rank));
      }
    }
    // Nobody may still read x or the last pair sums when the next step overwrites them.
    bar_sync(2, kThreads);
  }
  // With the last bytes here, nobody writes to this block any more: it may exit.
  mbarrier_wait(&full[kSteps % 2], static_cast<uint32_t>((kSteps - 1) / 2 % 2));
#endif
}

// A kernel per step, which starts before the one ahead ends and first reads what that leaves alone.
template <Bug kBug>
__global__ void dependent(const __grid_constant__ Arguments a, int t) {
  dependency_launch();
  const int unit = static_cast<int>(blockIdx.x * kUnits + threadIdx.x / 4);
  const uint32_t x = a.x[t * kH + unit];
  if (kBug != Bug::kNoDependencyWait) dependency_wait();
  const uint32_t v = finish(quarter_sums(a.h + t % 2 * kH, unit), x);
  if (threadIdx.x % 4 != 0) return;
  a.h[(t + 1) % 2 * kH + unit] = v;
  a.y[t * kH + unit] = v;
}

template <Bug kBug, Bug... kMine>
constexpr bool is_one_of() {
  return ((kBug == kMine) || ...);
}

// Compiles only the mistakes that a toy can make; another one is an error.
template <Bug kBug>
void start(Toy toy, const Arguments& a) {
  using enum Bug;
  Launch how{dim3(kBlocks), dim3(kThreads)};
  how.cooperative = toy == Toy::kGridFlag || toy == Toy::kGridSentinel;
  how.cluster = toy == Toy::kClusterBarrier || toy == Toy::kClusterAsync ? kBlocks : 1;
  if constexpr (is_one_of<kBug, kNone, kNoBarrier, kNoSyncAfterCopy, kLateCopyWait,
                          kNoSyncBeforeRelease, kRelaxedFlag, kOutOfBounds, kSingleBuffer,
                          kDivergence>()) {
    if (toy == Toy::kGridFlag) return launch("grid_flag", grid_flag<kBug>, how, a);
  }
  if constexpr (is_one_of<kBug, kNone, kLateCopyWait, kSingleReduction, kEarlyRecycle, kLateRecycle,
                          kNoFence>()) {
    if (toy == Toy::kGridSentinel) return launch("grid_sentinel", grid_sentinel<kBug>, how, a);
  }
  if constexpr (is_one_of<kBug, kNone, kNoBarrier, kNoLastBarrier, kSingleBuffer>()) {
    if (toy == Toy::kClusterBarrier) {
      return launch("cluster_barrier", cluster_barrier<kBug>, how, a);
    }
  }
  if constexpr (is_one_of<kBug, kNone, kNoMbarrierWait, kWrongBytes, kWrongParity, kSingleBuffer,
                          kNoFence, kNoPairBarrier>()) {
    if (toy == Toy::kClusterAsync) return launch("cluster_async", cluster_async<kBug>, how, a);
  }
  if constexpr (is_one_of<kBug, kNone, kNoDependencyWait>()) {
    if (toy == Toy::kDependent) {
      return overlapping([&] {
        for (int t = 0; t < kSteps; ++t) {
          how.programmatic = t > 0;
          launch("dependent", dependent<kBug>, how, a, t);
        }
      });
    }
  }
  throw std::invalid_argument("this toy cannot make this mistake");
}

template <int kBug = 0>
void choose(Toy toy, Bug bug, const Arguments& a) {
  if constexpr (kBug < static_cast<int>(Bug::kCount)) {
    if (static_cast<int>(bug) != kBug) return choose<kBug + 1>(toy, bug, a);
    start<static_cast<Bug>(kBug)>(toy, a);
  }
}

}  // namespace

std::vector<uint32_t> run_toy(Toy toy, Bug bug) {
  std::vector<uint32_t> h(4 * kH, kEmpty), x(kSteps * kH);
  for (int i = 0; i < kH; ++i) h[i] = static_cast<uint32_t>(i * i + 7);
  for (int i = 0; i < kSteps * kH; ++i) x[i] = static_cast<uint32_t>(i * 2246822519u);
  std::vector<uint32_t> state(h.begin(), h.begin() + kH);
  DeviceArray slots(h), inputs(x), counter(std::vector<uint32_t>(1));
  auto outputs = poison<uint32_t>(kSteps * kH);
  choose(toy, bug, {slots.get(), inputs.get(), outputs.get(), counter.get()});
  const auto y = outputs.read();
  for (int t = 0; t < kSteps; ++t) {
    std::vector<uint32_t> next(kH);
    for (int u = 0; u < kH; ++u) {
      uint32_t sum = 0;
      for (int k = 0; k < kH; ++k) sum += weight(u, k) * state[k];
      next[u] = finish(sum, x[t * kH + u]);
      if (y[t * kH + u] != next[u]) throw std::runtime_error("wrong values");
    }
    state = next;
  }
  return y;
}

}  // namespace frnn::toys
