// SPDX-License-Identifier: Apache-2.0
#include "cpu/engine.h"

namespace {
// Compiled with AVX2 and FMA. Of 16 registers 12 hold sums; the others weights and broadcasts.
constexpr int kVectorBytes = 32;
constexpr int kSumRegisters = 12;
}  // namespace

#include "cpu/engine.inl"

constinit const frnn::cpu::Engine frnn::cpu::kAvx2Engine = make_engine("avx2");
