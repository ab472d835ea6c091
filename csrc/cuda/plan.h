// SPDX-License-Identifier: Apache-2.0
// How the standard algorithm divides a product among blocks. Plain C++, and a pure function of the
// product's shape and the device.
#pragma once

#include <cstdint>

namespace frnn::cuda {

// What sums are made in, and S and A of recurrence.h.
enum class Arithmetic {
  kFloat16,   // S half, A float, tensor cores
  kBfloat16,  // S bfloat16, A float, tensor cores
  kTf32,      // float, operands of products rounded to 10 bits, tensor cores
  kFloat32,   // float, no tensor cores
  kFloat64,   // double, tensor cores where there are any
};

constexpr int kSlotRows = 8, kTileColumns = 8;  // rows of weights and of states, see product.cuh

// Tiles of rows whose sums a block's registers hold.
constexpr int most_tiles(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kFloat32 || arithmetic == Arithmetic::kFloat64 ? 2 : 8;
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a block owns: groups of eight units, with all their gates, and tiles of eight rows.
struct Shape {
  int groups, tiles;
};

// About 2, 4 or 8 slots, a slot being eight rows of weights, or the fewest that there are: whole
// units, and an even number, since an instruction of the tensor cores takes two.
constexpr Shape shape_of(int gates, int size, Arithmetic arithmetic) {
  const int least = gates % 2 == 0 ? 1 : 2, slots = 2 << size, tiles = size == 0 ? 1 : 2 << size;
  const int groups = slots / gates / least * least, most = most_tiles(arithmetic);
  return {groups > least ? groups : least, tiles < most ? tiles : most};
}

struct Blocks {
  int64_t x, y;  // along the rows of states and along the units
};

constexpr Blocks blocks_of(int64_t rows, int64_t units, const Shape& shape) {
  return {divide_up(rows, shape.tiles * kTileColumns), divide_up(units, shape.groups * kSlotRows)};
}

// How many sizes of blocks there are: small, middle, large. A large one of a few gates would leave
// each of its threads too many units to finish after the product, one after the other.
constexpr int sizes_of(int gates, Arithmetic arithmetic) {
  return gates >= 3 && most_tiles(arithmetic) == 8 ? 3 : 2;
}

// The size of a product's blocks. A step lasts as long as its busiest
// multiprocessor, and that as long as it takes to read what its blocks are made of: eight rows for
// each slot and each tile, since blocks share nothing. A row that is not there counts like one: it
// is not read, but multiplied. Of equal sizes the smallest, which has the shortest way from its
// last read to its end. Reasoned, not measured.
constexpr int size_of(int64_t rows, int64_t units, int gates, Arithmetic arithmetic,
                      int multiprocessors) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (int size = 0; size < sizes_of(gates, arithmetic); ++size) {
    const Shape shape = shape_of(gates, size, arithmetic);
    const Blocks blocks = blocks_of(rows, units, shape);
    const int64_t read =
        divide_up(blocks.x * blocks.y, multiprocessors) * (shape.groups * gates + shape.tiles);
    if (read < least) {
      best = size;
      least = read;
    }
  }
  return best;
}

// One product of every step.
struct Plan {
  Shape shape;
  Blocks blocks;
};

constexpr Plan plan_of(int64_t rows, int64_t units, int gates, Arithmetic arithmetic,
                       int multiprocessors) {
  const int size = size_of(rows, units, gates, arithmetic, multiprocessors);
  const Shape shape = shape_of(gates, size, arithmetic);
  return {shape, blocks_of(rows, units, shape)};
}

}  // namespace frnn::cuda
