// SPDX-License-Identifier: Apache-2.0
#include "cpu/engine.h"

namespace {
// Compiled with AVX-512 F, BW, VL and DQ. Of 32 registers 24 hold sums.
constexpr int kVectorBytes = 64;
constexpr int kSumRegisters = 24;
}  // namespace

#include "cpu/engine.inl"

constinit const frnn::cpu::Engine frnn::cpu::kAvx512Engine = make_engine("avx512");
