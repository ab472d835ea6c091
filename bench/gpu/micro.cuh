// SPDX-License-Identifier: Apache-2.0
// The kernels of the microbenchmarks. Each checks all the data that it is sent.
#pragma once

#include "cuda/primitives.h"

namespace frnn::cuda::micro {

struct Report {
  uint64_t cycles;  // of block 0 from its first step to its last
  uint32_t wrong;   // threads that saw wrong data
  uint32_t met;     // blocks that came to the meeting
};

__device__ void report_wrong(Report* report, bool wrong) {
  if (wrong) atomicAdd(&report->wrong, 1u);
}

// What step t sends as word i; never kEmpty.
constexpr uint32_t kEmpty = 0xffffffffu;
__device__ __forceinline__ uint32_t word(uint32_t t, uint32_t i) {
  return (t * 4099u + i) & 0x7fffffffu;
}
__device__ __forceinline__ bool holds(uint4 v, uint32_t t, uint32_t i) {
  return v.x == word(t, i) && v.y == word(t, i + 1) && v.z == word(t, i + 2) &&
         v.w == word(t, i + 3);
}

// ---- Clusters: so much shared memory that an SM takes one block, as it will of the real kernels.

constexpr size_t kOneBlockPerSm = 160 * 1024;

__global__ void meet(Report* report) {
  if (threadIdx.x != 0) return;
  red_release_add(&report->met, 1);
  while (load_acquire(&report->met) < gridDim.x) {
  }
}

// One barrier a step; with kData each block also hands a word to the next one.
template <bool kData>
__global__ void cluster_barriers(int steps, Report* report) {
#if FRNN_HAVE_CLUSTER
  FRNN_SHARED(uint32_t, given, 2);
  const int rank = cluster_rank(), size = cluster_size();
  const ClusterAddress next = map_rank(given, (rank + 1) % size);
  const auto before = static_cast<uint32_t>((rank + size - 1) % size);
  bool wrong = false;
  cluster_arrive();
  cluster_wait();
  const uint64_t start = cycles();
  for (int t = 0; t < steps; ++t) {
    const auto step = static_cast<uint32_t>(t), mine = static_cast<uint32_t>(rank);
    if (kData && threadIdx.x == 0) cluster_store(next + 4 * (t % 2), word(step, mine));
    cluster_arrive();
    cluster_wait();
    if (kData) wrong |= given[t % 2] != word(step, before);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) report->cycles = cycles() - start;
  report_wrong(report, wrong);
  cluster_arrive();
  cluster_wait();
#endif
}

// 16 bytes by st.async from the first block of a cluster to the last and back; each way is a step.
__global__ void async_hops(int steps, Report* report) {
#if FRNN_HAVE_CLUSTER
  FRNN_SHARED(uint4, slot, 1);
  FRNN_SHARED(uint64_t, full, 1);
  const int rank = cluster_rank(), last = cluster_size() - 1;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, 16);
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0 && (rank == 0 || rank == last)) {
    const ClusterAddress to = map_rank(slot, last - rank), barrier = map_rank(full, last - rank);
    auto send = [&](uint32_t v) { store_async(to, uint4{v, v + 1, v + 2, v + 3}, barrier); };
    bool wrong = false;
    const uint64_t start = cycles();
    if (rank == 0) send(0);
    for (int t = rank == 0 ? 1 : 0; t < steps; t += 2) {  // receives message t, sends t + 1
      mbarrier_wait(full, static_cast<uint32_t>(t / 2 % 2));
      const uint4 v = slot[0];
      wrong |=
          v.x != static_cast<uint32_t>(t) || v.y != v.x + 1 || v.z != v.x + 2 || v.w != v.x + 3;
      mbarrier_arrive_expect_tx(full, 16);
      if (t + 1 < steps) send(v.x + 1);
    }
    if (blockIdx.x == 0) report->cycles = cycles() - start;
    report_wrong(report, wrong);
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
#endif
}

// A step of the recurrence: each block holds its share of a tile, sends it to all, and goes on with
// the whole tile. Neighbouring lanes send to different blocks and every warp to every block, so a
// block that has all of a step knows that every warp of every block has read the step before: two
// buffers suffice.
template <int kStores>
__global__ void async_exchange(int steps, Report* report) {
#if FRNN_HAVE_CLUSTER
  FRNN_DYN_SMEM(buffers);
  FRNN_SHARED(uint64_t, full, 2);
  const int rank = cluster_rank(), size = cluster_size(), tid = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x), chunks = threads * kStores;
  const int bytes = 16 * chunks;
  ClusterAddress to[kStores], barrier[kStores];
  uint32_t sent[kStores], read[kStores];  // first words
  for (int i = 0; i < kStores; ++i) {
    const int item = i * threads + tid, peer = item % size;
    const int chunk = rank * (chunks / size) + item / size;
    to[i] = map_rank(buffers + 16 * chunk, peer);
    barrier[i] = map_rank(full, peer);
    sent[i] = static_cast<uint32_t>(4 * chunk);
    read[i] = static_cast<uint32_t>(4 * item);
  }
  if (tid == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(&full[i], 1);
    fence_mbarrier_init();
    for (int i = 0; i < 2; ++i) mbarrier_arrive_expect_tx(&full[i], static_cast<uint32_t>(bytes));
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  auto send = [&](int t) {
    const auto step = static_cast<uint32_t>(t);
    for (int i = 0; i < kStores; ++i) {
      const uint4 v = {word(step, sent[i]), word(step, sent[i] + 1), word(step, sent[i] + 2),
                       word(step, sent[i] + 3)};
      store_async(to[i] + t % 2 * bytes, v, barrier[i] + t % 2 * 8);
    }
  };
  bool wrong = false;
  const uint64_t start = cycles();
  send(0);
  for (int t = 0; t < steps; ++t) {
    mbarrier_wait(&full[t % 2], static_cast<uint32_t>(t / 2 % 2));
    if (tid == 0 && t + 2 < steps) {
      mbarrier_arrive_expect_tx(&full[t % 2], static_cast<uint32_t>(bytes));
    }
    const uint4* tile = reinterpret_cast<const uint4*>(buffers + t % 2 * bytes);
    for (int i = 0; i < kStores; ++i) {
      wrong |= !holds(tile[read[i] / 4], static_cast<uint32_t>(t), read[i]);
    }
    __syncwarp();
    if (t + 1 < steps) send(t + 1);
  }
  if (blockIdx.x == 0 && tid == 0) report->cycles = cycles() - start;
  report_wrong(report, wrong);
  __syncwarp();
  cluster_arrive();
  cluster_wait();
#endif
}

// ---- The same step through L2, by blocks of kThreads of which an SM takes one. A tile has
// 4 * kVectors * kThreads words, a block's share is at most kThreads of them.

constexpr int kThreads = 256;

// A counter says when a tile is there. Two buffers: whoever counts a step has read the one before.
template <int kVectors>
__global__ void flag_hops(uint4* data, uint32_t* counter, int steps, Report* report) {
  constexpr uint32_t kWords = 4 * kVectors * kThreads;
  const uint32_t tid = threadIdx.x, share = kWords / gridDim.x, mine = blockIdx.x * share + tid;
  bool wrong = false;
  const uint64_t start = cycles();
  for (uint32_t t = 0; t < static_cast<uint32_t>(steps); ++t) {
    uint4* tile = data + t % 2 * (kWords / 4);
    if (tid < share) store_relaxed(reinterpret_cast<uint32_t*>(tile) + mine, word(t, mine));
    __syncthreads();
    if (tid == 0) {
      red_release_add(counter, 1);
      while (load_acquire(counter) < gridDim.x * (t + 1)) {
      }
    }
    __syncthreads();
    uint4 v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = load_relaxed(tile + i * kThreads + tid);
    for (int i = 0; i < kVectors; ++i) wrong |= !holds(v[i], t, 4 * (i * kThreads + tid));
  }
  if (blockIdx.x == 0 && tid == 0) report->cycles = cycles() - start;
  report_wrong(report, wrong);
}

__device__ __forceinline__ bool has_empty(uint4 v) {
  return v.x == kEmpty || v.y == kEmpty || v.z == kEmpty || v.w == kEmpty;
}

// The data is the flag: four rotating buffers, polled until no word is kEmpty.
template <int kVectors>
__global__ void data_hops(uint4* data, int steps, Report* report) {
  constexpr uint32_t kWords = 4 * kVectors * kThreads;
  const uint32_t tid = threadIdx.x, share = kWords / gridDim.x, mine = blockIdx.x * share + tid;
  auto publish = [&](uint32_t t, uint32_t v) {
    if (tid < share) {
      store_relaxed(reinterpret_cast<uint32_t*>(data) + t % 4 * kWords + mine, v);
    }
  };
  bool wrong = false;
  const uint64_t start = cycles();
  publish(0, word(0, mine));
  for (uint32_t t = 0; t < static_cast<uint32_t>(steps); ++t) {
    const uint4* tile = data + t % 4 * (kWords / 4);
    uint4 v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = load_relaxed(tile + i * kThreads + tid);
    for (int i = 0; i < kVectors; ++i) {
      while (has_empty(v[i])) v[i] = load_relaxed(tile + i * kThreads + tid);
      wrong |= !holds(v[i], t, 4 * (i * kThreads + tid));
    }
    __syncthreads();
    // All of step t is here, so all blocks have read step t - 1: its buffer will take t + 3.
    if (t + 1 < static_cast<uint32_t>(steps)) publish(t + 1, word(t + 1, mine));
    if (t > 0) publish(t - 1, kEmpty);
    fence_gpu();
  }
  if (blockIdx.x == 0 && tid == 0) report->cycles = cycles() - start;
  report_wrong(report, wrong);
}

// ---- Chains of dependent mma: 16 a step and warp, dealt to kChains accumulators. Rows and columns
// of small integers, so that the sums stay exact.

constexpr int kMmaPerStep = 16;

template <int kChains>
__global__ void mma_chains(int steps, Report* report) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
  auto row = [](int i) { return static_cast<float>(1 + i % 3); };
  auto column = [](int i) { return static_cast<float>(1 + i % 2); };
  const uint32_t low = pack_bf16(row(g), row(g)), high = pack_bf16(row(g + 8), row(g + 8));
  const uint32_t a[4] = {low, high, low, high};
  const uint32_t b[2] = {pack_bf16(column(g), column(g)), pack_bf16(column(g), column(g))};
  float d[kChains][4] = {};
  __syncthreads();
  const uint64_t start = cycles();
  for (int t = 0; t < steps; ++t) {
    for (int i = 0; i < kMmaPerStep; ++i) mma_bf16(d[i % kChains], a, b);
  }
  bool wrong = false;
  for (int i = 0; i < kChains * 4; ++i) {
    const float sum = 16 * row(g + i % 4 / 2 * 8) * column(2 * q + i % 2);
    wrong |= d[i / 4][i % 4] != static_cast<float>(steps * kMmaPerStep / kChains) * sum;
  }
  report_wrong(report, wrong);
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) report->cycles = cycles() - start;
}

}  // namespace frnn::cuda::micro
