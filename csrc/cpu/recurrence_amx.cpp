// SPDX-License-Identifier: Apache-2.0
#define FRNN_TILES  // not the compiler's own macro, which -march=native defines everywhere
#include <immintrin.h>

#include "cpu/engine.h"

namespace {
// As AVX-512.
constexpr int kVectorBytes = 64;
constexpr int kSumRegisters = 24;
}  // namespace

#include "cpu/recurrence.inl"

constinit const frnn::cpu::TileEngine frnn::cpu::kAmxTiles = {run_forward<frnn::BFloat16>,
                                                              run_backward<frnn::BFloat16>};
