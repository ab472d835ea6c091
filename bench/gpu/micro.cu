// SPDX-License-Identifier: Apache-2.0
// micro GROUP FILE: measures what the persistent kernels stand on and appends lines to FILE:
// name, parameter, median, p10 and p90 over launches, unit. Every kernel checks all the data that
// it is sent; after a launch that saw a wrong word nothing is written. A step's cycles are those of
// block 0, its nanoseconds a launch's, by events, over its steps. In the simulator the kernels run
// for their data alone.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_array.h"

namespace {

using namespace frnn::cuda;

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

// ---- The host.

#if defined(FRNN_SIM)

constexpr int kSteps = 6, kLaunches = 3;
constexpr bool kMeasures = false;
const std::vector<int> kClusterSizes = {2, 4, 8}, kGrids = {4, 8};

int max_clusters(const void*, int, int) { return 2; }

struct Timer {
  void start() { frnn::sim::set_seed(++launches); }
  double stop() { return 0; }
  uint64_t launches = 0;
};

#else

// So many steps that the launch counts for little, and so few that mma_chains' sums stay exact.
constexpr int kSteps = 10000;
constexpr int kLaunches = 40;  // the first half warms the clocks up
constexpr bool kMeasures = true;
const std::vector<int> kClusterSizes = {2, 4, 8, 16}, kGrids = {16, 32, 64, 128};

// How many clusters of such blocks the device holds at once.
int max_clusters(const void* kernel, int cluster, int threads) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kOneBlockPerSm));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = kOneBlockPerSm;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  return clusters;
}

class Timer {
 public:
  Timer() {
    check(cudaEventCreate(&start_));
    check(cudaEventCreate(&stop_));
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }
  void start() { check(cudaEventRecord(start_)); }
  double stop() {  // nanoseconds since start
    check(cudaEventRecord(stop_));
    check(cudaEventSynchronize(stop_));
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return 1e6 * milliseconds;
  }

 private:
  cudaEvent_t start_, stop_;
};

#endif

std::vector<std::string> rows;

void add_row(const std::string& name, const std::string& parameter, std::vector<double> values,
             const char* unit) {
  std::sort(values.begin(), values.end());
  auto percentile = [&](size_t p) { return values[p * (values.size() - 1) / 100]; };
  char text[200];
  std::snprintf(text, sizeof(text), "%s,%s,%.5g,%.5g,%.5g,%s", name.c_str(), parameter.c_str(),
                percentile(50), percentile(10), percentile(90), kMeasures ? unit : "simulated");
  rows.push_back(text);
}

// Times run(report) and adds its rows: a step's cycles, nanoseconds and, for a tile of so many
// bytes, bytes per cycle that a block takes in. Throws if a thread saw wrong data.
void measure(const std::string& name, const std::string& parameter, int steps, int bytes,
             const std::function<void()>& prepare, const std::function<void(Report*)>& run) {
  Timer timer;
  std::vector<double> counts, times, rates;
  for (int i = 0; i < kLaunches; ++i) {
    prepare();
    DeviceArray report(std::vector<Report>(1));
    timer.start();
    run(report.get());
    const double time = timer.stop();
    const Report seen = report.read()[0];
    if (seen.wrong > 0) {
      throw std::runtime_error(name + " " + parameter + ": wrong data in " +
                               std::to_string(seen.wrong) + " threads");
    }
    if (i < kLaunches / 2) continue;
    counts.push_back(static_cast<double>(seen.cycles) / steps);
    times.push_back(time / steps);
    rates.push_back(bytes / counts.back());
  }
  add_row(name, parameter, counts, "cycles");
  add_row(name, parameter, times, "ns");
  if (bytes > 0) add_row(name, parameter, rates, "bytes/cycle");
}

Launch cluster_launch(int clusters, int cluster, int threads) {
  Launch how{dim3(static_cast<unsigned>(clusters * cluster)), dim3(static_cast<unsigned>(threads))};
  how.cluster = cluster;
  how.smem = kOneBlockPerSm;
  return how;
}

// For each size, one cluster alone and as many as the device holds.
void measure_clusters(const std::string& name, void (*kernel)(int, Report*), int threads,
                      int bytes) {
  for (int cluster : kClusterSizes) {
    const int most = max_clusters(reinterpret_cast<const void*>(kernel), cluster, threads);
    if (most == 0) std::printf("%s: no cluster of %d fits\n", name.c_str(), cluster);
    for (int clusters : {1, most}) {
      if (most == 0) continue;
      const std::string parameter = "C=" + std::to_string(cluster) +
                                    " clusters=" + std::to_string(clusters) +
                                    " threads=" + std::to_string(threads) +
                                    (bytes > 0 ? " bytes=" + std::to_string(bytes) : std::string());
      measure(
          name, parameter, kSteps, bytes, [] {},
          [&](Report* report) {
            launch(name.c_str(), kernel, cluster_launch(clusters, cluster, threads), kSteps,
                   report);
          });
    }
  }
}

void measure_max_clusters() {
  for (int cluster : kClusterSizes) {
    const int most = max_clusters(reinterpret_cast<const void*>(meet), cluster, 32);
    if (most > 0) {
      DeviceArray report(std::vector<Report>(1));
      Launch how = cluster_launch(most, cluster, 32);
      how.cooperative = true;
      launch("meet", meet, how, report.get());
      if (report.read()[0].met != how.grid.x) throw std::runtime_error("blocks are missing");
    }
    add_row("max_clusters", "C=" + std::to_string(cluster), {double(most)}, "clusters");
  }
}

void measure_barriers() {
  for (int threads : {32, 256}) {
    measure_clusters("cluster_barrier_data", cluster_barriers<true>, threads, 0);
    measure_clusters("cluster_barrier", cluster_barriers<false>, threads, 0);
  }
}

void measure_async_hops() { measure_clusters("st_async_hop", async_hops, 32, 0); }

void measure_async_exchange() {
  measure_clusters("st_async_step", async_exchange<1>, 64, 1024);
  measure_clusters("st_async_step", async_exchange<1>, 256, 4096);
  measure_clusters("st_async_step", async_exchange<2>, 256, 8192);
  measure_clusters("st_async_step", async_exchange<4>, 256, 16384);
}

template <int kVectors>
void measure_hops(bool data_is_flag) {
  constexpr int kTile = 16 * kVectors * kThreads;
  const std::vector<uint4> empty(4 * kTile / 16, uint4{kEmpty, kEmpty, kEmpty, kEmpty});
  const std::string name = data_is_flag ? "data_hop" : "flag_hop";
  for (int blocks : kGrids) {
    if (kTile / 4 / blocks > kThreads) continue;  // a thread publishes one word
    DeviceArray data(empty);
    DeviceArray counter(std::vector<uint32_t>(1));
    Launch how{dim3(static_cast<unsigned>(blocks)), dim3(kThreads)};
    how.cooperative = true;
    how.smem = kOneBlockPerSm;
    measure(
        name, "blocks=" + std::to_string(blocks) + " bytes=" + std::to_string(kTile), kSteps, kTile,
        [&] {
          data.write(empty);
          counter.write({0});
        },
        [&](Report* report) {
          if (data_is_flag) {
            launch("data_hops", data_hops<kVectors>, how, data.get(), kSteps, report);
          } else {
            launch("flag_hops", flag_hops<kVectors>, how, data.get(), counter.get(), kSteps,
                   report);
          }
        });
  }
}

void measure_flag_hops() {
  measure_hops<1>(false);
  measure_hops<4>(false);
}

void measure_data_hops() {
  measure_hops<1>(true);
  measure_hops<4>(true);
}

template <int kChains>
void measure_chains() {
  for (int warps : {1, 4, 8}) {
    const std::string parameter =
        "chains=" + std::to_string(kChains) + " warps=" + std::to_string(warps);
    const size_t before = rows.size();
    Launch how{dim3(1), dim3(static_cast<unsigned>(32 * warps))};
    measure(
        "mma", parameter, kSteps * kMmaPerStep, 0, [] {},
        [&](Report* report) { launch("mma_chains", mma_chains<kChains>, how, kSteps, report); });
    rows.resize(before + 1);  // one block's nanoseconds say nothing
  }
}

void measure_mma() {
  measure_chains<1>();
  measure_chains<2>();
  measure_chains<4>();
  measure_chains<8>();
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> groups = {{"max_clusters", measure_max_clusters},
                                                    {"cluster_barrier", measure_barriers},
                                                    {"st_async_hop", measure_async_hops},
                                                    {"st_async_step", measure_async_exchange},
                                                    {"flag_hop", measure_flag_hops},
                                                    {"data_hop", measure_data_hops},
                                                    {"mma", measure_mma}};
  const auto group = groups.find(argc == 3 ? argv[1] : "");
  if (group == groups.end()) {
    std::puts("usage: micro GROUP FILE");
    return 2;
  }
  try {
    group->second();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  std::ofstream file(argv[2], std::ios::app);
  for (const std::string& row : rows) file << row << '\n';
  return file ? 0 : 1;
}
