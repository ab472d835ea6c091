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
#include "micro.cuh"

namespace {

using namespace frnn::cuda;
using namespace frnn::cuda::micro;

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
  allow_shared_memory(name.c_str(), kernel, kOneBlockPerSm);
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
  allow_shared_memory("meet", meet, kOneBlockPerSm);
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
    allow_shared_memory("data_hops", data_hops<kVectors>, how.smem);
    allow_shared_memory("flag_hops", flag_hops<kVectors>, how.smem);
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
