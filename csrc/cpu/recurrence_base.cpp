// SPDX-License-Identifier: Apache-2.0
#include "cpu/engine.h"

namespace {
// Compiled for the platform's baseline: SSE2 with 16 registers, or NEON with 32.
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kSumRegisters = 24;
#else
constexpr int kSumRegisters = 12;
#endif
}  // namespace

#include "cpu/engine.inl"

constinit const frnn::cpu::Engine frnn::cpu::kBaseEngine = make_engine("base");
