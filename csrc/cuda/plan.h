// SPDX-License-Identifier: Apache-2.0
// Which algorithm runs a call, and how it is divided among blocks. Plain C++, and pure functions of
// the call's shape and the device.
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

struct Call {
  int64_t rows, hidden, out;  // B, H, P
  int gates;
  Arithmetic arithmetic;
  bool backward, projection;
  int sides = 1;  // 2: both directions of a layer, side by side
};

// ---- The standard algorithm.

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

// ---- The cluster algorithm.

struct Device {
  int multiprocessors;
  int capability;     // 90 for 9.0
  int shared_memory;  // bytes that a block may have
  bool waits = true;  // blocks may wait for each other, and none ever waited in vain
};

// A cluster of blocks owns a few tiles of rows for all steps, and a block of it some units.
struct ClusterShape {
  int blocks;    // of a cluster: 1 or kClusterBlocks, or 0 where the algorithm cannot be used
  int clusters;  // of each side
  int tiles;     // of a cluster
  int warps;     // of a block
  int units;     // of a block: its warps have eight or sixteen each

  // Shared memory of a block: the operands of each tile, which are h in forward and the gates'
  // gradients in backward, and what begins at these offsets.
  int chunks;    // of an operand
  int operands;  // of a tile: two that take turns, or one in backward, at the price of a barrier
  int weights, exchange, barriers, rows, bytes;

  bool deals;  // rows by length, the longest ones first, since clusters do not all run at once
};

constexpr int kClusterBlocks = 8;    // more are not portable, and send at half the rate
constexpr int kMostWarps = 8;        // so that a thread has 255 registers
constexpr int kMostTiles = 2;        // of which one is sent while the other is multiplied
constexpr int kMostDealt = 512;      // rows, since each is compared with all others
constexpr int kChunkBytes = 8 * 64;  // eight rows, k in 64 bytes: a piece of 16 bytes for each lane

constexpr bool has_tensor_cores(Arithmetic arithmetic) {
  return arithmetic != Arithmetic::kFloat32 && arithmetic != Arithmetic::kFloat64;
}

constexpr int value_bytes(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kFloat16:
    case Arithmetic::kBfloat16:
      return 2;
    case Arithmetic::kTf32:
    case Arithmetic::kFloat32:
      return 4;
    default:
      return 8;
  }
}

// Of a warp. In forward it owns its units' rows of W_hh, along k all units of the cluster. In
// backward it owns, of each block's units, the groups of its own number, along k the gates of its
// own block's units: what it sums for them goes to the warp of the same number.
constexpr int cluster_groups(int gates, int blocks, bool backward) {
  return blocks == 1 || (!backward && gates < 4) ? 2 : 1;
}
constexpr int cluster_slots(int gates, int blocks, bool backward) {
  return cluster_groups(gates, blocks, backward) * (backward ? blocks : gates);
}

// Chunks of weights that are kept in registers, the others in shared memory: at most 128 registers,
// or 96 or 64 where what cells need leaves no more.
constexpr int cluster_held(int gates, int blocks, int tiles, bool backward) {
  const bool fewer = backward ? blocks == 1 || tiles > 1 : gates == 3 && tiles > 1;
  const int pieces = !fewer ? 32 : backward && gates == 3 && tiles > 1 ? 16 : 24;
  const int fit = pieces / cluster_slots(gates, blocks, backward);
  return backward || fit < 8 ? fit : 8;
}

constexpr ClusterShape cluster_shape_of(int blocks, int tiles, int operands, int warps,
                                        const Call& call) {
  const int gates = call.gates, size = value_bytes(call.arithmetic);
  const bool backward = call.backward;
  const int slots = cluster_slots(gates, blocks, backward);
  const int held = cluster_held(gates, blocks, tiles, backward);
  ClusterShape shape{};
  shape.blocks = blocks;
  shape.clusters = static_cast<int>(divide_up(call.rows, tiles * kTileColumns));
  shape.tiles = tiles;
  shape.warps = warps;
  shape.units = warps * cluster_groups(gates, blocks, backward) * kSlotRows;
  const int k = (backward ? gates : blocks) * shape.units;
  shape.chunks = static_cast<int>(divide_up(k * size, 64));
  if (shape.chunks < held) shape.chunks = held;
  shape.operands = operands;
  shape.weights = tiles * operands * shape.chunks * kChunkBytes;
  shape.exchange = shape.weights + warps * (shape.chunks - held) * slots * kChunkBytes;
  // In backward the blocks' sums, float [2, blocks, units, 8] of each tile; in forward what is
  // sent.
  const int values = shape.units * kTileColumns;
  const int exchange = backward ? tiles * 2 * blocks * values * 4 : values * size;
  shape.barriers = shape.exchange + (blocks == 1 ? 0 : exchange);
  shape.rows = shape.barriers + tiles * 2 * (backward ? warps : 1) * 8;
  shape.bytes = shape.rows + tiles * kTileColumns * 4;
  return shape;
}

// How many clusters a device runs at once, one block on a multiprocessor. Of eight blocks: the
// multiprocessors come in groups that clusters do not cross, so that some are left over (15
// clusters on the 132 of an H200).
constexpr int64_t clusters_at_once(int blocks, int multiprocessors) {
  return blocks == 1 ? multiprocessors : multiprocessors / blocks * 15 / 16;
}

// One block where its registers hold all weights, since nothing need be sent then. Rows that would
// have to wait for a cluster are instead a second tile of one, which makes a step longer, though
// not twice as long; those of more than two rounds are better off without clusters.
// Reasoned, not measured.
constexpr ClusterShape cluster_shape(const Call& call, const Device& device) {
  constexpr ClusterShape kNone{};
  if (device.capability < 90 || !has_tensor_cores(call.arithmetic)) return kNone;
  const int blocks = call.hidden * value_bytes(call.arithmetic) <= 256 ? 1 : kClusterBlocks;
  const int groups = cluster_groups(call.gates, blocks, call.backward);
  const int64_t warps = divide_up(call.hidden, blocks * groups * kSlotRows);
  if (warps > kMostWarps) return kNone;
  const int64_t at_once = clusters_at_once(blocks, device.multiprocessors);
  const int64_t tiles = call.sides * divide_up(call.rows, kTileColumns);
  for (int of_each = tiles > at_once && blocks > 1 ? kMostTiles : 1; of_each > 0; --of_each) {
    for (int operands = 2; operands >= (call.backward ? 1 : 2); --operands) {
      ClusterShape shape =
          cluster_shape_of(blocks, of_each, operands, static_cast<int>(warps), call);
      if (shape.bytes > device.shared_memory) continue;
      const int64_t clusters = call.sides * shape.clusters;
      shape.deals = clusters > at_once && call.rows <= kMostDealt;
      return clusters <= 2 * at_once ? shape : kNone;
    }
  }
  return kNone;
}

// ---- The grid algorithm.

constexpr int kGridWarps = 8, kGridGroups = 2;
constexpr int kGridUnits = kGridGroups * kSlotRows;  // of a block
constexpr int kExchangeSlots = 4;                    // that take turns
constexpr int kMostGridTiles = 16;                   // of a team
constexpr int kMostStates = 2;                       // of a cell

constexpr int grid_slots(int gates) { return gates * kGridGroups; }

// Chunks of a warp's weights in registers.
constexpr int grid_held(int gates, bool backward) {
  if (backward) return 16;
  return gates == 1 ? 8 : 4;
}

// A team of blocks owns a few tiles of rows for all steps, and a block of it kGridUnits units.
struct GridShape {
  int teams, blocks;  // of each side, of a team; no teams where the algorithm cannot be used
  int tiles;          // of a team
  int chunks, each;   // of an operand: all, and a warp's share in forward
  int64_t exchange;   // bytes of global memory
  int64_t patience;   // clock cycles after which a block gives up its wait for others

  // Shared memory of a block: its weights, and what begins at these offsets; and all.
  int operands, sums, states, barriers, failed, bytes;
};

constexpr GridShape grid_shape_of(int64_t teams, int64_t blocks, int tiles, const Call& call) {
  const int gates = call.gates, size = value_bytes(call.arithmetic);
  const bool backward = call.backward;
  const int held = grid_held(gates, backward);
  GridShape shape{};
  shape.teams = static_cast<int>(teams);
  shape.blocks = static_cast<int>(blocks);
  shape.tiles = tiles;
  // In backward along the gates of a block of each cluster, of the same rank.
  const int64_t k = backward ? blocks / kClusterBlocks * gates * kGridUnits : blocks * kGridUnits;
  shape.chunks = static_cast<int>(divide_up(k * size, 64));
  shape.each = static_cast<int>(divide_up(shape.chunks, kGridWarps));
  if (backward && shape.chunks < held) shape.chunks = held;
  shape.exchange = call.sides * teams * kExchangeSlots * tiles * (backward ? kClusterBlocks : 1) *
                   shape.chunks * kChunkBytes;
  shape.patience = 4'000'000'000;  // about two seconds

  const int of_warp = backward ? shape.chunks : shape.each;
  const int slots = backward ? kGridGroups : grid_slots(gates);
  shape.operands = kGridWarps * (of_warp > held ? of_warp - held : 0) * slots * kChunkBytes;
  shape.sums = shape.operands + (backward ? 2 * shape.chunks * kChunkBytes : 0);
  const int values = kSlotRows * kTileColumns;  // of a slot and tile
  shape.states =
      shape.sums +
      2 * values * 4 * (backward ? tiles * kClusterBlocks * kGridGroups : kGridWarps * slots);
  const int cells = (tiles + 1) / 2 * kGridWarps * 32;  // of a block
  shape.barriers = shape.states + kMostStates * cells * 4;
  shape.failed = shape.barriers + tiles * 2 * 8;
  shape.bytes = shape.failed + 16;
  return shape;
}

// As many teams as there is room for, the rows' tiles divided among them. A step lasts about as
// long as its tiles take one after the other, 0.4 us each, which is less than the standard
// algorithm takes for as many rows while there are kMostGridTiles at most. All blocks must be
// resident at once; in backward they are clusters of eight. Reasoned, not measured.
constexpr GridShape grid_shape(const Call& call, const Device& device) {
  constexpr GridShape kNone{};
  if (!device.waits || !has_tensor_cores(call.arithmetic)) return kNone;
  if (call.backward && device.capability < 90) return kNone;
  const int together = call.backward ? kClusterBlocks : 1;
  const int64_t blocks = divide_up(call.hidden, kGridUnits * together) * together;
  const int64_t room = clusters_at_once(together, device.multiprocessors) / (blocks / together);
  if (room < call.sides) return kNone;
  const int64_t tiles = divide_up(call.rows, kTileColumns);
  const int64_t of_each = divide_up(tiles, room / call.sides);
  if (of_each > kMostGridTiles) return kNone;
  const GridShape shape =
      grid_shape_of(divide_up(tiles, of_each), blocks, static_cast<int>(of_each), call);
  return shape.bytes <= device.shared_memory ? shape : kNone;
}

// ---- The choice.

enum class Algorithm { kStandard, kCluster, kGrid };

struct Choice {
  Algorithm algorithm = Algorithm::kStandard;
  int sides = 1;              // at once: both directions, where there is room for them
  ClusterShape cluster = {};  // of Algorithm::kCluster
  GridShape grid = {};        // of Algorithm::kGrid
};

constexpr Choice choose(const Call& call, const Device& device) {
  for (Call some = call; some.sides > 0 && !call.projection; --some.sides) {
    const ClusterShape cluster = cluster_shape(some, device);
    if (cluster.blocks > 0) return {Algorithm::kCluster, some.sides, cluster};
    const GridShape grid = grid_shape(some, device);
    if (grid.teams > 0) return {Algorithm::kGrid, some.sides, {}, grid};
  }
  return {};
}

}  // namespace frnn::cuda
