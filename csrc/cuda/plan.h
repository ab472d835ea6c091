// SPDX-License-Identifier: Apache-2.0
// How the standard algorithm divides a product among blocks. Plain C++, and a pure function of the
// product's shape and the device.
#pragma once

#include <cstdint>

namespace frnn::cuda {

constexpr int kSlotRows = 8, kTileColumns = 8;  // rows of weights and of states, see product.cuh

// Groups of eight units a block owns: an even number of slots, about four.
constexpr int groups_of(int gates) { return gates >= 4 && gates % 2 == 0 ? 1 : gates > 1 ? 2 : 4; }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Blocks {
  int64_t x, y;  // along the rows of states and along the units
};

constexpr Blocks blocks_of(int64_t rows, int64_t units, int gates, int tiles) {
  return {divide_up(rows, tiles * kTileColumns), divide_up(units, groups_of(gates) * kSlotRows)};
}

// Tiles of rows a block takes, 1 or `most`, what the registers hold. A step ends when its last
// block does. Until every multiprocessor has a block, blocks of one tile finish sooner and leave
// none of them idle; from then on `most` tiles share one read of the weights, which is what a step
// reads most of. Reasoned, not measured.
constexpr int tiles_of(int64_t rows, int64_t units, int gates, int most, int multiprocessors) {
  if (rows <= kTileColumns) return 1;  // one tile holds them all
  const Blocks blocks = blocks_of(rows, units, gates, most);
  return blocks.x * blocks.y >= multiprocessors ? most : 1;
}

}  // namespace frnn::cuda
