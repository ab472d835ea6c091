// SPDX-License-Identifier: Apache-2.0
// The checks of what moves data between threads, blocks and launches.
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "device_array.h"

namespace frnn::checks {
namespace {

using namespace frnn::cuda;

void require(bool ok, const char* sentence) {
  if (!ok) throw std::runtime_error(sentence);
}

// ---- cp.async of each size and with zero fill, in dynamic shared memory. out: [128] bytes.
__global__ void copies(const unsigned char* in, unsigned char* out) {
  FRNN_DYN_SMEM(smem);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 4) {
    cp_async<16>(smem + 16 * lane, in + 16 * lane);
  } else if (lane < 8) {
    cp_async<8>(smem + 64 + 8 * (lane - 4), in + 64 + 8 * (lane - 4));
  } else if (lane < 16) {
    cp_async<4>(smem + 96 + 4 * (lane - 8), in + 96 + 4 * (lane - 8), lane - 12 > 0 ? 4 : 2);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = lane; i < 128; i += 32) out[i] = smem[i];
}

Answer check_copies() {
  std::vector<unsigned char> in(128);
  for (int i = 0; i < 128; ++i) in[i] = static_cast<unsigned char>(i + 1);
  DeviceArray source(in);
  auto array = poison<unsigned char>(128);
  Launch how{dim3(1), dim3(32)};
  how.smem = 128;
  launch("copies", copies, how, source.get(), array.get());
  const auto out = array.read();
  for (int i = 0; i < 128; ++i) {
    const bool filled = i >= 96 && i < 96 + 4 * 5 && i % 4 >= 2;
    require(out[i] == (filled ? 0 : in[i]), "a copy is wrong");
  }
  return answer(out);
}

// ---- One warp hands on to another by bar.arrive and bar.sync.
__global__ void named_barriers(int* out) {
  FRNN_SHARED(int, value, 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x < 32) {
    value[lane] = 3 * lane;
    bar_arrive(1, 64);
  } else {
    bar_sync(1, 64);
    out[lane] = value[31 - lane];
  }
}

Answer check_named_barriers() {
  auto array = poison<int>(32);
  launch("named_barriers", named_barriers, Launch{dim3(1), dim3(64)}, array.get());
  const auto out = array.read();
  for (int i = 0; i < 32; ++i) require(out[i] == 3 * (31 - i), "a named barrier let a thread pass");
  return answer(out);
}

// ---- Words of each width, written and read back by other threads of the block. out: [32][8].
__global__ void words(uint4* four, uint64_t* two, uint32_t* one, uint32_t* out) {
  const uint32_t i = threadIdx.x;
  store_relaxed(&four[i], uint4{i, i + 1, i + 2, i + 3});
  store_relaxed(&two[i], (uint64_t{i} << 32) + 5);
  store_relaxed(&one[i], 7 * i);
  store_system(&one[32 + i], 9 * i);
  __syncthreads();
  const uint32_t j = 31 - i;
  const uint4 a = load_relaxed(&four[j]);
  const uint64_t b = load_relaxed(&two[j]);
  const uint32_t values[8] = {a.x,
                              a.y,
                              a.z,
                              a.w,
                              static_cast<uint32_t>(b >> 32),
                              static_cast<uint32_t>(b),
                              load_relaxed(&one[j]),
                              load_relaxed(&one[32 + j])};
  for (int k = 0; k < 8; ++k) out[8 * i + k] = values[k];
}

Answer check_words() {
  auto four = poison<uint4>(32);
  auto two = poison<uint64_t>(32);
  auto one = poison<uint32_t>(64), array = poison<uint32_t>(8 * 32);
  launch("words", words, Launch{dim3(1), dim3(32)}, four.get(), two.get(), one.get(), array.get());
  const auto out = array.read();
  for (uint32_t i = 0; i < 32; ++i) {
    const uint32_t j = 31 - i, expected[8] = {j, j + 1, j + 2, j + 3, j, 5, 7 * j, 9 * j};
    for (int k = 0; k < 8; ++k) require(out[8 * i + k] == expected[k], "a word is wrong");
  }
  return answer(out);
}

// ---- A message from block to block, in three ways. data: [blocks][32], flags: [blocks].
__global__ void messages(uint32_t* data, uint32_t* flags) {
  const uint32_t block = blockIdx.x, lane = threadIdx.x;
  uint32_t value = 100 + lane;
  if (block > 0) {
    const uint32_t* flag = flags + block - 1;
    if (block % 3 == 0) {  // relaxed, with fences on both sides
      while (load_relaxed(flag) == 0) {
      }
      fence_gpu();
    } else {
      while (load_acquire(flag) == 0) {
      }
    }
    value = 3 * data[32 * (block - 1) + (lane + 1) % 32];
  }
  data[32 * block + lane] = value;
  __syncwarp();
  if (lane != 0) return;
  if (block % 3 == 2) {
    fence_gpu();
    store_relaxed(flags + block, 1);
  } else if (block % 3 == 1) {
    store_release(flags + block, 1);
  } else {
    red_release_add(flags + block, 1);
  }
}

Answer check_messages() {
  constexpr int kBlocks = 7;
  auto data = poison<uint32_t>(32 * kBlocks);
  DeviceArray flags(std::vector<uint32_t>(kBlocks, 0));
  Launch how{dim3(kBlocks), dim3(32)};
  how.cooperative = true;
  launch("messages", messages, how, data.get(), flags.get());
  const auto out = data.read();
  for (int i = 0; i < 32 * kBlocks; ++i) {
    const uint32_t expected = i < 32 ? 100 + i : 3 * out[i / 32 * 32 - 32 + (i + 1) % 32];
    require(out[i] == expected, "a message was read too early");
  }
  return answer(out);
}

// ---- Clocks do not run backwards. out: [32][2].
__global__ void clocks(uint32_t* out) {
  const uint64_t timer = global_timer(), count = cycles();
  __syncthreads();
  out[2 * threadIdx.x] = global_timer() >= timer;
  out[2 * threadIdx.x + 1] = cycles() >= count;
}

Answer check_clocks() {
  auto array = poison<uint32_t>(64);
  launch("clocks", clocks, Launch{dim3(1), dim3(32)}, array.get());
  const auto out = array.read();
  for (uint32_t word : out) require(word == 1, "a clock ran backwards");
  return answer(out);
}

// ---- A kernel that starts before the one ahead ends sees what that wrote.
__global__ void dependent(const uint32_t* in, uint32_t* out) {
  dependency_launch();
  dependency_wait();
  const uint32_t n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = 3 * in[n - 1 - i] + 1;
}

Answer check_dependency() {
  constexpr uint32_t kCount = 64 * 128;
  std::vector<uint32_t> in(kCount);
  for (uint32_t i = 0; i < kCount; ++i) in[i] = i;
  DeviceArray source(in);
  auto middle = poison<uint32_t>(kCount), array = poison<uint32_t>(kCount);
  Launch how{dim3(64), dim3(128)};
  overlapping([&] {
    launch("dependent", dependent, how, source.get(), middle.get());
    how.programmatic = true;
    launch("dependent", dependent, how, middle.get(), array.get());
  });
  const auto out = array.read();
  for (uint32_t i = 0; i < kCount; ++i) require(out[i] == 9 * i + 4, "a dependency was not kept");
  return answer(std::vector(out.begin(), out.begin() + 128));
}

// ---- Bulk copies of two phases into one place, and a barrier that all threads arrive at.
// in: [2][64]; out: [3][64].
__global__ void bulk(const uint32_t* in, uint32_t* out) {
#if FRNN_HAVE_CLUSTER
  FRNN_SHARED(uint32_t, place, 64);
  FRNN_SHARED(uint64_t, full, 1);
  FRNN_SHARED(uint64_t, met, 1);
  const int tid = static_cast<int>(threadIdx.x);
  if (tid == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(met, 64);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (tid == 0) {
    mbarrier_arrive_expect_tx(full, 256);
    bulk_copy(place, in, 256, full);
  }
  while (!mbarrier_try_wait(full, 0)) {
  }
  out[tid] = place[63 - tid];
  __syncthreads();
  place[tid] = 5;
  fence_proxy_async();
  __syncthreads();
  if (tid == 0) {
    mbarrier_expect_tx(full, 256);
    bulk_copy(place, in + 64, 128, full);
    bulk_copy(place + 32, in + 96, 128, full);
    mbarrier_arrive(full);
  }
  mbarrier_wait(full, 1);
  out[64 + tid] = place[63 - tid];
  __syncthreads();
  place[tid] = static_cast<uint32_t>(7 * tid);
  mbarrier_arrive(met);
  mbarrier_wait(met, 0);
  out[128 + tid] = place[63 - tid];
#endif
}

Answer check_bulk() {
  std::vector<uint32_t> in(128);
  for (uint32_t i = 0; i < 128; ++i) in[i] = i * i;
  DeviceArray source(in);
  auto array = poison<uint32_t>(3 * 64);
  launch("bulk", bulk, Launch{dim3(1), dim3(64)}, source.get(), array.get());
  const auto out = array.read();
  for (uint32_t i = 0; i < 64; ++i) {
    const uint32_t j = 63 - i;
    require(out[i] == in[j] && out[64 + i] == in[64 + j], "a bulk copy is wrong");
    require(out[128 + i] == 7 * j, "an mbarrier let a thread pass");
  }
  return answer(out);
}

// ---- Loads and stores in a cluster. out: [2 clusters][4 blocks][32][4].
__global__ void cluster(uint32_t* out) {
#if FRNN_HAVE_CLUSTER
  FRNN_SHARED(uint32_t, value, 32);
  FRNN_SHARED(uint32_t, given, 32);
  const int rank = cluster_rank(), size = cluster_size(), lane = static_cast<int>(threadIdx.x);
  value[lane] = static_cast<uint32_t>(100 * rank + lane);
  cluster_arrive();
  cluster_wait();
  const uint32_t taken = cluster_load(map_rank(value, (rank + 1) % size) + 4 * (31 - lane));
  cluster_store(map_rank(given + lane, (rank + 1) % size), value[lane] + 1);
  cluster_arrive();
  cluster_wait();
  uint32_t* mine = out + 4 * (32 * blockIdx.x + lane);
  mine[0] = static_cast<uint32_t>(rank);
  mine[1] = static_cast<uint32_t>(size);
  mine[2] = taken;
  mine[3] = given[lane];
#endif
}

Answer check_cluster() {
  auto array = poison<uint32_t>(8 * 32 * 4);
  Launch how{dim3(8), dim3(32)};
  how.cluster = 4;
  launch("cluster", cluster, how, array.get());
  const auto out = array.read();
  for (uint32_t i = 0; i < 8 * 32; ++i) {
    const uint32_t rank = i / 32 % 4, lane = i % 32;
    require(out[4 * i] == rank && out[4 * i + 1] == 4, "a cluster's rank or size is wrong");
    require(out[4 * i + 2] == 100 * ((rank + 1) % 4) + 31 - lane, "a load in a cluster is wrong");
    require(out[4 * i + 3] == 100 * ((rank + 3) % 4) + lane + 1, "a store in a cluster is wrong");
  }
  return answer(out);
}

// ---- st.async of both widths from each of 4 blocks to each, counted with arrivals of the others.
// out: [4 blocks][4 sources][5].
__global__ void stores_async(uint32_t* out) {
#if FRNN_HAVE_CLUSTER
  FRNN_SHARED(uint4, four, 4);
  FRNN_SHARED(uint32_t, one, 4);
  FRNN_SHARED(uint64_t, full, 1);
  const int rank = cluster_rank(), lane = static_cast<int>(threadIdx.x);
  if (lane == 0) {
    mbarrier_init(full, 4);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, 4 * 20);
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
  if (lane < 4) {
    const ClusterAddress barrier = map_rank(full, lane);
    const auto v = static_cast<uint32_t>(100 * rank + 10 * lane);
    store_async(map_rank(four + rank, lane), uint4{v, v + 1, v + 2, v + 3}, barrier);
    store_async(map_rank(one + rank, lane), v + 4, barrier);
    if (lane != rank) mbarrier_arrive_remote(barrier);
  }
  mbarrier_wait(full, 0);
  if (lane < 4) {
    uint32_t* mine = out + 5 * (4 * rank + lane);
    mine[0] = four[lane].x;
    mine[1] = four[lane].y;
    mine[2] = four[lane].z;
    mine[3] = four[lane].w;
    mine[4] = one[lane];
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
#endif
}

Answer check_store_async() {
  auto array = poison<uint32_t>(4 * 4 * 5);
  Launch how{dim3(4), dim3(32)};
  how.cluster = 4;
  launch("stores_async", stores_async, how, array.get());
  const auto out = array.read();
  for (uint32_t i = 0; i < 4 * 4 * 5; ++i) {
    const uint32_t rank = i / 20, source = i / 5 % 4;
    require(out[i] == 100 * source + 10 * rank + i % 5, "an asynchronous store is wrong");
  }
  return answer(out);
}

}  // namespace

Answer run_exchange(int check) {
  constexpr Answer (*kChecks[])() = {check_copies,   check_named_barriers, check_words,
                                     check_messages, check_clocks,         check_dependency,
                                     check_bulk,     check_cluster,        check_store_async};
  return kChecks[check]();
}

}  // namespace frnn::checks
