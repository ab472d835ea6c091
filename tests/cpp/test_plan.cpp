// SPDX-License-Identifier: Apache-2.0
// Which algorithm runs a call on CUDA and how it is divided, for devices that are not here.
// Needs no CUDA, no torch and no test framework: prints what fails, and fails.
#include "cuda/plan.h"

#include <cstdint>
#include <cstdio>

namespace {

using namespace frnn::cuda;

int failures = 0;

struct Case {
  int64_t rows, units;
  int gates;
  Arithmetic arithmetic;
  int multiprocessors, size;
};

void expect(bool holds, const char* what, const Case& c) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %lld rows, %lld units of %d gates, arithmetic %d, %d multiprocessors\n",
              what, static_cast<long long>(c.rows), static_cast<long long>(c.units), c.gates,
              static_cast<int>(c.arithmetic), c.multiprocessors);
}

constexpr int kA100 = 108, kA10 = 72, kH100 = 132, kH20 = 78, kB200 = 148;
constexpr auto kBf16 = Arithmetic::kBfloat16, kFp32 = Arithmetic::kFloat32;
constexpr int kSmall = 0, kMiddle = 1, kLarge = 2;

// Four gates in forward, three of them in a GRU's, one in backward.
constexpr Case kCases[] = {
    {1, 4096, 4, kBf16, kH100, kSmall},      // one tile of rows: larger blocks read more
    {8, 65536, 4, kBf16, kH100, kSmall},     //
    {8, 65536, 4, kBf16, 1, kSmall},         //
    {128, 128, 4, kBf16, kH100, kMiddle},    // 16 x 16 blocks are two for most of 132, 4 x 16 one
    {32, 256, 4, kBf16, kH100, kSmall},      // 4 x 32 small blocks, one for each
    {32, 256, 4, kBf16, kA10, kMiddle},      // two for each, or one middle one
    {32, 512, 4, kBf16, kH100, kMiddle},     //
    {64, 512, 4, kBf16, kH100, kMiddle},     // 2 x 64
    {128, 512, 4, kBf16, kH100, kMiddle},    // 4 x 64: two for each read as much as a large one
    {128, 1024, 4, kBf16, kH100, kLarge},    // 2 x 64
    {128, 1024, 4, kBf16, kA100, kLarge},    // two for some, which read less than five middle ones
    {128, 1024, 4, kBf16, kB200, kLarge},    //
    {64, 2048, 4, kBf16, kH100, kLarge},     // 1 x 128
    {128, 1024, 3, kBf16, kH100, kLarge},    // GRU
    {128, 1024, 1, kBf16, kH100, kMiddle},   // backward: 4 x 32, and no large blocks
    {8, 1024, 1, kBf16, kH100, kSmall},      // 1 x 64
    {64, 2048, 1, kBf16, kH20, kMiddle},     //
    {128, 1024, 4, kFp32, kH100, kMiddle},   // float32 and float64 have registers for two tiles
    {4096, 4096, 4, kFp32, kH100, kMiddle},  //
};

// Forward and backward by the cluster algorithm: blocks of a cluster, its tiles, units of a block.
struct ClusterCase {
  int64_t rows, units;
  int gates;
  Arithmetic arithmetic;
  Device device;
  int blocks, tiles, units_forward, units_backward;
};

constexpr int k227KB = 227 * 1024, k99KB = 99 * 1024;
constexpr Device kH200{132, 90, k227KB}, kOneGpc{16, 90, k227KB}, kRtx{170, 120, k99KB},
    kB200Device{148, 100, k227KB}, kA100Device{108, 80, 163 * 1024};
constexpr auto kTf32 = Arithmetic::kTf32;

constexpr ClusterCase kClusterCases[] = {
    {1, 256, 4, kBf16, kH200, 8, 1, 32, 32},
    {120, 256, 4, kBf16, kH200, 8, 1, 32, 32},  // 15 clusters at once
    {121, 256, 4, kBf16, kH200, 8, 2, 32, 32},  //
    {480, 256, 4, kBf16, kH200, 8, 2, 32, 32},  // two rounds of them
    {481, 256, 4, kBf16, kH200, 0, 0, 0, 0},    //
    {256, 256, 4, kBf16, kB200Device, 8, 2, 32, 32},
    {32, 256, 4, kBf16, kOneGpc, 8, 2, 32, 32},
    {2112, 128, 4, kBf16, kH200, 1, 1, 128, 128},  // a block for each tile
    {8, 129, 4, kBf16, kH200, 8, 1, 24, 24},
    {8, 129, 3, kBf16, kH200, 8, 1, 32, 24},  // warps of 16 units in forward
    {64, 512, 4, kBf16, kH200, 8, 1, 64, 64},
    {64, 513, 4, kBf16, kH200, 0, 0, 0, 0},  // more warps than have registers
    {8, 384, 4, kTf32, kH200, 8, 1, 48, 48},
    {8, 64, 4, kTf32, kH200, 1, 1, 64, 64},
    {8, 65, 4, kTf32, kH200, 8, 1, 16, 16},
    {8, 256, 4, kBf16, kRtx, 8, 1, 32, 32},
    {8, 512, 4, kBf16, kRtx, 0, 0, 0, 0},         // more than its shared memory
    {8, 256, 4, kBf16, kA100Device, 0, 0, 0, 0},  // no clusters
    {8, 256, 4, kFp32, kH200, 0, 0, 0, 0},        // no tensor cores
};

void expect_cluster(const ClusterCase& c, bool backward) {
  Call call{c.rows, c.units, c.units, c.gates, c.arithmetic, backward, false};
  const ClusterShape shape = cluster_shape(call, c.device);
  const Case shown{c.rows, c.units, c.gates, c.arithmetic, c.device.multiprocessors, backward};
  expect(shape.blocks == c.blocks, "blocks of a cluster", shown);
  expect(shape.tiles == c.tiles, "tiles of a cluster", shown);
  expect(shape.units == (backward ? c.units_backward : c.units_forward), "units", shown);
  expect(shape.blocks * shape.units >= (c.blocks > 0 ? c.units : 0), "all units", shown);
  expect(shape.bytes <= c.device.shared_memory, "shared memory", shown);
  const int64_t at_once = clusters_at_once(c.blocks > 0 ? c.blocks : 1, c.device.multiprocessors);
  expect(shape.deals == (shape.clusters > at_once && c.rows <= kMostDealt), "deals", shown);
  expect(shape.clusters * shape.tiles * kTileColumns >= (c.blocks > 0 ? c.rows : 0), "rows", shown);
  call.projection = true;
  expect(choose(call, c.device).algorithm == Algorithm::kStandard, "projection", shown);
}

// Both directions of a layer: how many run at once, the clusters or teams of each, and their tiles;
// and how many run at once in backward.
struct BothCase {
  int64_t rows, units;
  Algorithm algorithm;
  int sides, number, tiles, backward;
};

constexpr BothCase kBothCases[] = {
    {56, 256, Algorithm::kCluster, 2, 7, 1, 2},    // 14 clusters of 15
    {64, 256, Algorithm::kCluster, 2, 4, 2, 2},    // 16: two tiles each
    {240, 256, Algorithm::kCluster, 2, 15, 2, 2},  // two rounds
    {241, 256, Algorithm::kGrid, 2, 4, 8, 2},      // three rounds of clusters
    {1025, 256, Algorithm::kStandard, 1, 0, 0, 1},
    {8, 1024, Algorithm::kGrid, 2, 1, 1, 1},  // 15 clusters are no two teams of 8
    {8, 768, Algorithm::kGrid, 2, 1, 1, 2},
    {16, 768, Algorithm::kGrid, 2, 1, 2, 2},
    {128, 768, Algorithm::kGrid, 2, 1, 16, 2},
    {129, 768, Algorithm::kGrid, 1, 2, 9, 1},
};

void expect_both(const BothCase& c) {
  Call call{c.rows, c.units, c.units, 4, kBf16, false, false, 2};
  const Case shown{c.rows, c.units, 4, kBf16, kH200.multiprocessors, 2};
  const Choice choice = choose(call, kH200);
  const auto& [algorithm, sides, cluster, grid] = choice;
  expect(algorithm == c.algorithm, "algorithm of both", shown);
  expect(sides == c.sides, "directions at once", shown);
  expect(cluster.clusters + grid.teams == c.number, "clusters or teams of each", shown);
  expect(cluster.tiles + grid.tiles == c.tiles, "tiles of both", shown);
  call.backward = true;
  expect(choose(call, kH200).sides == c.backward, "directions at once in backward", shown);
  if (algorithm != Algorithm::kGrid) return;
  call = {c.rows, c.units, c.units, 4, kBf16, false, false};
  const GridShape alone = grid_shape_of(c.number, grid.blocks, c.tiles, call);
  expect(grid.exchange == sides * alone.exchange, "exchange of both", shown);
}

// By the grid algorithm: teams, blocks of each, tiles of each; in forward and in backward.
struct GridCase {
  int64_t rows, units;
  int gates;
  Arithmetic arithmetic;
  Device device;
  int teams, blocks, tiles, teams_backward, blocks_backward, tiles_backward;
};

constexpr Device kLost{132, 90, k227KB, false};

constexpr GridCase kGridCases[] = {
    {16, 768, 4, kBf16, kH200, 2, 48, 1, 2, 48, 1},
    {16, 1024, 4, kBf16, kH200, 2, 64, 1, 1, 64, 2},  // 15 clusters are no two teams of 8
    {33, 1024, 4, kBf16, kH200, 2, 64, 3, 1, 64, 5},
    {128, 1024, 4, kBf16, kH200, 2, 64, 8, 1, 64, 16},
    {129, 1024, 4, kBf16, kH200, 2, 64, 9, 0, 0, 0},
    {64, 2048, 4, kBf16, kH200, 1, 128, 8, 0, 0, 0},  // and 15 clusters not one of 16
    {48, 1024, 4, kTf32, kH200, 2, 64, 3, 1, 64, 6},
    {57, 1024, 4, kTf32, kH200, 2, 64, 4, 0, 0, 0},  // sums of eight tiles have no room
    {8, 777, 3, kBf16, kH200, 1, 49, 1, 1, 56, 1},   // blocks of backward come in eights
    {16, 2112, 4, kBf16, kH200, 1, 132, 2, 0, 0, 0},
    {8, 1920, 4, kBf16, kH200, 1, 120, 1, 1, 120, 1},
    {8, 1024, 4, kTf32, kH200, 1, 64, 1, 1, 64, 1},
    {8, 1024, 4, kBf16, kA100Device, 1, 64, 1, 0, 0, 0},  // no clusters, which backward needs
    {8, 1024, 4, kBf16, kLost, 0, 0, 0, 0, 0, 0},
    {8, 1024, 4, kFp32, kH200, 0, 0, 0, 0, 0, 0},
};

void expect_grid(const GridCase& c, bool backward) {
  const Call call{c.rows, c.units, c.units, c.gates, c.arithmetic, backward, false};
  const GridShape shape = grid_shape(call, c.device);
  const Case shown{c.rows, c.units, c.gates, c.arithmetic, c.device.multiprocessors, backward};
  expect(shape.teams == (backward ? c.teams_backward : c.teams), "teams", shown);
  expect(shape.blocks == (backward ? c.blocks_backward : c.blocks), "blocks of a team", shown);
  expect(shape.tiles == (backward ? c.tiles_backward : c.tiles), "tiles of a team", shown);
  expect(shape.teams * shape.blocks <= c.device.multiprocessors, "resident", shown);
  expect(shape.bytes <= c.device.shared_memory, "shared memory", shown);
  const Algorithm expected = shape.teams > 0 ? Algorithm::kGrid : Algorithm::kStandard;
  expect(choose(call, c.device).algorithm == expected, "algorithm", shown);
}

}  // namespace

int main() {
  for (const BothCase& c : kBothCases) expect_both(c);
  for (const GridCase& c : kGridCases) {
    expect_grid(c, false);
    expect_grid(c, true);
  }
  for (const ClusterCase& c : kClusterCases) {
    expect_cluster(c, false);
    expect_cluster(c, true);
  }
  for (const Case& c : kCases) {
    const int size = size_of(c.rows, c.units, c.gates, c.arithmetic, c.multiprocessors);
    expect(size == c.size, "size", c);
    const Shape shape = shape_of(c.gates, size, c.arithmetic);
    const auto [x, y] = blocks_of(c.rows, c.units, shape);
    const int64_t rows = shape.tiles * 8, units = shape.groups * 8;
    expect(x * rows >= c.rows && (x - 1) * rows < c.rows, "blocks along rows", c);
    expect(y * units >= c.units && (y - 1) * units < c.units, "blocks along units", c);
  }
  for (int gates = 1; gates <= 4; ++gates) {
    for (int size = 0; size < sizes_of(gates, kBf16); ++size) {
      const Case c{0, 0, gates, kBf16, 0, size};
      expect(shape_of(gates, size, kBf16).groups * gates % 2 == 0, "slots in pairs", c);
    }
  }
  if (failures == 0) std::printf("all good\n");
  return failures == 0 ? 0 : 1;
}
