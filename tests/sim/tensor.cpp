// SPDX-License-Identifier: Apache-2.0
// The data movement and arithmetic of warp collectives, on the arguments of all 32 lanes. Lane
// layouts as in the PTX ISA document: g = lane / 4, q = lane % 4.
#include <cmath>
#include <utility>

#include "machine.h"

namespace frnn::sim {
namespace {

uint64_t count = 0;  // of products of tensor cores since this was last asked

float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float of_bf16(uint32_t bits) { return of_bits(bits << 16); }

float of_f16(uint32_t bits) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(__half(raw));
}

// d[16,8] += a[16,K] b[K,8], summed in fp32 in the order of k.
template <int K>
void multiply(void* const* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  ++count;
  float d[16][8];
  auto each = [&](auto f) {
    for (int lane = 0; lane < 32; ++lane) {
      auto& l = *static_cast<Mma16*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) f(l.d[i], d[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
    }
  };
  each([](float mine, float& whole) { whole = mine; });
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < K; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  each([](float& mine, float whole) { mine = whole; });
}

template <class F>
void multiply16(void* const* lanes, F convert) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& l = *static_cast<const Mma16*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[g + 8 * (i % 2)][2 * q + 8 * (i / 2) + half] = convert(l.a[i] >> 16 * half & 0xffff);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        b[2 * q + 8 * i + half][g] = convert(l.b[i] >> 16 * half & 0xffff);
      }
    }
  }
  multiply<16>(lanes, a, b);
}

// One 8x8 matrix of 16-bit values: register of a lane <-> [row][column].
uint32_t fragment(const uint16_t (&m)[8][8], int lane, bool transpose) {
  const int g = lane / 4, q = lane % 4;
  if (transpose) return m[2 * q][g] | static_cast<uint32_t>(m[2 * q + 1][g]) << 16;
  return m[g][2 * q] | static_cast<uint32_t>(m[g][2 * q + 1]) << 16;
}

}  // namespace

uint64_t products() { return std::exchange(count, 0); }

void finish_mma_bf16(void* const* lanes, uint32_t) { multiply16(lanes, of_bf16); }
void finish_mma_f16(void* const* lanes, uint32_t) { multiply16(lanes, of_f16); }

void finish_mma_tf32(void* const* lanes, uint32_t) {
  auto truncate = [](uint32_t bits) { return of_bits(bits & 0xffffe000u); };
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& l = *static_cast<const Mma16*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][q + 4 * (i / 2)] = truncate(l.a[i]);
    for (int i = 0; i < 2; ++i) b[q + 4 * i][g] = truncate(l.b[i]);
  }
  multiply<8>(lanes, a, b);
}

void finish_mma_f64(void* const* lanes, uint32_t) {
  double a[8][4], b[4][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& l = *static_cast<const MmaF64*>(lanes[lane]);
    a[lane / 4][lane % 4] = l.a;
    b[lane % 4][lane / 4] = l.b;
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& l = *static_cast<MmaF64*>(lanes[lane]);
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 4; ++k) {
        l.d[i] = std::fma(a[lane / 4][k], b[k][lane % 4 * 2 + i], l.d[i]);
      }
    }
  }
}

void finish_ldmatrix(void* const* lanes, uint32_t) {
  const int count = static_cast<const Matrices*>(lanes[0])->count;
  for (int i = 0; i < count; ++i) {
    uint16_t m[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* p = static_cast<const Matrices*>(lanes[8 * i + row])->row;
      check_shared("ldmatrix", *grid->running->block, p, 16, 16);
      touch_read(p, 16);
      copy_bytes(m[row], p, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto& l = *static_cast<Matrices*>(lanes[lane]);
      l.r[i] = fragment(m, lane, l.transpose);
    }
  }
}

void finish_movmatrix(void* const* lanes, uint32_t) {
  uint16_t m[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t v = *static_cast<const uint32_t*>(lanes[lane]);
    m[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(v);
    m[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(v >> 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    *static_cast<uint32_t*>(lanes[lane]) = fragment(m, lane, true);
  }
}

void finish_shuffle(void* const* lanes, uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto& l = *static_cast<Shuffle*>(lanes[lane]);
    if ((mask >> l.source & 1) == 0) fail("a shuffle reads a lane that its mask lacks");
    l.result = static_cast<const Shuffle*>(lanes[l.source])->value;
  }
}

void finish_vote(void* const* lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && static_cast<const Vote*>(lanes[lane])->predicate) {
      votes |= 1u << lane;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) static_cast<Vote*>(lanes[lane])->result = votes;
  }
}

}  // namespace frnn::sim
