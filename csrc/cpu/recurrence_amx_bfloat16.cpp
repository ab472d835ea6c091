// SPDX-License-Identifier: Apache-2.0
// Values stored in bfloat16 on AMX tiles.
#define FRNN_TILES  // not the compiler's own macro, which -march=native defines everywhere
#define FRNN_BFLOAT16

#include "cpu/engine.h"

namespace {
// As AVX-512.
constexpr int kVectorBytes = 64;
constexpr int kSumRegisters = 24;
}  // namespace

#include "cpu/recurrence.inl"

constinit const frnn::cpu::TileEngine<frnn::BFloat16> frnn::cpu::kAmxBFloat16 = {
    run_forward<frnn::BFloat16>, run_backward<frnn::BFloat16>};
