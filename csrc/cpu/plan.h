// SPDX-License-Identifier: Apache-2.0
// How a call is divided among threads, and whether tiles take products of float: pure functions of
// its shape.
#pragma once

#include <cstdint>

namespace frnn::cpu {

struct Problem {
  int threads;           // available
  int64_t rows;          // B
  int64_t unit_blocks;   // hidden units, in vectors
  double step_flops;     // of the products of one time step
  int64_t weight_bytes;  // packed
  bool often;            // slices of units meet two to four times a step, not once
};

struct Plan {
  // By units: every slice computes its units of all rows and meets the others after every step.
  // By rows: every slice runs the whole sequence of its rows alone and reads all the weights.
  bool by_units;
  int slices;
};

// A slice must have enough work per step to pay for the meeting (about 0.3 us with two threads,
// more with many): 60 kflop take it 1 us when it streams weights from L2.
inline constexpr double kFlopsPerUnitSlice = 60e3;
// Rows need not meet, so the whole call counts; a slice of 12 rows already reuses each weight
// enough to be bound by arithmetic.
inline constexpr int64_t kRowsPerSlice = 12;
// All slices read all the weights, so these must stay in each core's own cache.
inline constexpr int64_t kPrivateCacheBytes = 512 << 10;
// To save more meetings, fewer rows and more weights are borne.
inline constexpr int64_t kRowsPerSliceIfOften = 4;
inline constexpr int64_t kPrivateCacheBytesIfOften = 1 << 20;

inline Plan make_plan(const Problem& p) {
  const int64_t row_slices = p.rows / (p.often ? kRowsPerSliceIfOften : kRowsPerSlice);
  const int64_t most_bytes = p.often ? kPrivateCacheBytesIfOften : kPrivateCacheBytes;
  if (p.threads > 1 && row_slices >= p.threads && p.weight_bytes <= most_bytes) {
    return {false, p.threads};
  }
  int64_t slices = static_cast<int64_t>(p.step_flops / kFlopsPerUnitSlice);
  if (slices > p.unit_blocks) slices = p.unit_blocks;
  if (slices > p.threads) slices = p.threads;
  return {true, slices < 1 ? 1 : static_cast<int>(slices)};
}

// Values of float have three parts on tiles. Fewer rows of all steps save less than it costs to
// part the weights.
inline constexpr int64_t kRowsWorthParting = 128;

inline bool tiles_pay(int64_t steps, int64_t rows) { return steps * rows >= kRowsWorthParting; }

// From so many rows on tiles make the products of each step too, while vectors compute the cells.
inline constexpr int64_t kRowsOnTiles = 24;
// .. or from so many, if the weights, packed, have at most so many bytes: two caches' worth.
inline constexpr int64_t kRowsOnTilesIfCached = 16;
inline constexpr int64_t kBytesCached = 3200 << 10;

inline bool tiles_pay_in_steps(int64_t rows, int64_t bytes) {
  return rows >= (bytes <= kBytesCached ? kRowsOnTilesIfCached : kRowsOnTiles);
}

// Whether a step takes the input projection into its own product: then that has no array of its
// own, but W_ih is read at every step, not once for the steps of a chunk. It must not depend on the
// threads, as the sums do on it.
inline constexpr int64_t kRowsFused = 64;  // times the parts of a value

inline bool fusing_pays(int64_t rows, int parts, int64_t bytes, int64_t steps_of_chunk) {
  return rows * parts >= kRowsFused && (bytes <= kBytesCached || steps_of_chunk == 1);
}

}  // namespace frnn::cpu
