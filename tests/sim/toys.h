// SPDX-License-Identifier: Apache-2.0
// Small kernels that exchange a state every step in the ways the real ones do, with
// mistakes to plant. The simulator is right if it catches every mistake and nothing else.
#pragma once

#include <cstdint>
#include <vector>

namespace frnn::toys {

enum class Toy { kGridFlag, kGridSentinel, kClusterBarrier, kClusterAsync, kDependent };
constexpr const char* kNames[] = {"grid_flag", "grid_sentinel", "cluster_barrier", "cluster_async",
                                  "dependent"};

enum class Bug {
  kNone,
  kNoBarrier,            // grid (1) or cluster (9) barrier missing
  kNoSyncAfterCopy,      // 2
  kLateCopyWait,         // 3: waits after it has read; sentinel: the prefetch wait is off by one
  kNoSyncBeforeRelease,  // 4
  kRelaxedFlag,          // 5: relaxed instead of release and acquire
  kOutOfBounds,          // 7
  kSingleBuffer,         // 8, 11: the state is not double-buffered
  kNoLastBarrier,        // 10: a block exits while others write to it
  kNoMbarrierWait,       // 12
  kWrongBytes,           // 13: expect_tx of too few bytes
  kWrongParity,
  kSingleReduction,  // partial sums are not double-buffered
  kEarlyRecycle,     // a slot is emptied before all have read it
  kLateRecycle,      // a slot is emptied in the step before the one that fills it
  kNoFence,          // of the slots; of the mbarrier's initialisation
  kNoPairBarrier,    // the named barrier of two warps missing
  kDivergence,       // a lane leaves a collective out
  kNoDependencyWait,
  kCount
};

// Runs a toy and compares with a plain loop; throws, with a sentence, if it fails in any way.
// Returns the states [T, H].
std::vector<uint32_t> run_toy(Toy toy, Bug bug);

}  // namespace frnn::toys
