// SPDX-License-Identifier: Apache-2.0
// How the standard CUDA kernels divide their products among blocks, for devices that are not here.
// Needs no CUDA, no torch and no test framework: prints what fails, and fails.
#include "cuda/plan.h"

#include <cstdint>
#include <cstdio>

namespace {

using frnn::cuda::blocks_of;
using frnn::cuda::groups_of;
using frnn::cuda::tiles_of;

int failures = 0;

struct Case {
  int64_t rows, units;
  int gates, most, multiprocessors, tiles;
};

void expect(bool holds, const char* what, const Case& c) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %lld rows, %lld units of %d gates, %d or 1 tiles on %d multiprocessors\n",
              what, static_cast<long long>(c.rows), static_cast<long long>(c.units), c.gates,
              c.most, c.multiprocessors);
}

constexpr int kA100 = 108, kA30 = 56, kA10 = 72, kH100 = 132, kH20 = 78, kB200 = 148;

// Four gates in forward, one in backward.
constexpr Case kCases[] = {
    {1, 4096, 4, 4, kH100, 1},     // rows of one tile, however many blocks
    {8, 65536, 4, 4, 1, 1},        //
    {9, 8, 4, 4, 1, 4},            // a single multiprocessor is always full
    {32, 512, 4, 4, kA30, 4},      // 64 blocks of four tiles
    {32, 512, 4, 4, kA10, 1},      //
    {32, 512, 4, 4, kH20, 1},      //
    {32, 512, 4, 4, kA100, 1},     //
    {32, 864, 4, 4, kA100, 4},     // 108 blocks, just enough
    {32, 864, 4, 4, kH100, 1},     //
    {32, 1184, 4, 4, kB200, 4},    // 148 blocks
    {32, 1176, 4, 4, kB200, 1},    // 147
    {128, 512, 4, 4, kH100, 4},    // 4 x 64 blocks
    {128, 512, 3, 4, kH100, 1},    // GRU: 4 x 32
    {128, 512, 3, 4, kA100, 4},    //
    {128, 512, 1, 4, kH100, 1},    // backward: 4 x 16
    {1024, 512, 1, 4, kH100, 4},   // 32 x 16
    {128, 512, 1, 2, kH100, 1},    // float64: 8 x 16 = 128
    {128, 512, 1, 2, kA100, 2},    //
    {4096, 4096, 4, 1, kH100, 1},  // float32 has registers for one tile only
};

}  // namespace

int main() {
  for (const Case& c : kCases) {
    const int tiles = tiles_of(c.rows, c.units, c.gates, c.most, c.multiprocessors);
    expect(tiles == c.tiles, "tiles", c);
    const auto [x, y] = blocks_of(c.rows, c.units, c.gates, tiles);
    expect(x * tiles * 8 >= c.rows && (x - 1) * tiles * 8 < c.rows, "blocks along rows", c);
    const int64_t each = groups_of(c.gates) * 8;
    expect(y * each >= c.units && (y - 1) * each < c.units, "blocks along units", c);
  }
  if (failures == 0) std::printf("all good\n");
  return failures == 0 ? 0 : 1;
}
