// SPDX-License-Identifier: Apache-2.0
// Values stored in float on AMX tiles, in parts of bfloat16.
#define FRNN_TILES

#include "cpu/engine.h"

namespace {
// As AVX-512.
constexpr int kVectorBytes = 64;
constexpr int kSumRegisters = 24;
}  // namespace

#include "cpu/recurrence.inl"

constinit const frnn::cpu::TileEngine<float> frnn::cpu::kAmxFloat = {run_forward<float>,
                                                                     run_backward<float>};
