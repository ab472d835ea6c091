// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "cpu/engine.h"

namespace {
// As AVX-512, with tiles for products of bfloat16.
constexpr int kVectorBytes = 64;
constexpr int kSumRegisters = 24;
}  // namespace

#include "cpu/recurrence.inl"

constinit const frnn::cpu::Engine frnn::cpu::kAmxEngine = make_engine("amx");
