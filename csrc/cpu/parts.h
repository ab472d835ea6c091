// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 numbers in bfloat16, as they are or in parts. For the translation units compiled
// for AMX.
#pragma once

#include <immintrin.h>

#include "numeric.h"

namespace frnn {
inline namespace amx {

template <class V>
FRNN_FN V widen(__m256i halves) {
  static_assert(Value<V>::kLanes == 16);
  using Halves = Vector<uint16_t, 16>;
  using Bits = typename Value<V>::Bits;
  const Bits bits = __builtin_convertvector(__builtin_bit_cast(Halves, halves), Bits);
  return __builtin_bit_cast(V, bits << 16);
}

template <class V>
FRNN_FN V load(const BFloat16* p, int n) {
  return widen<V>(n == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                          : _mm256_maskz_loadu_epi16((1u << n) - 1, p));
}

FRNN_FN void store_halves(BFloat16* p, __m256i halves, int n) {
  if (n == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  } else {
    _mm256_mask_storeu_epi16(p, (1u << n) - 1, halves);
  }
}

// Rounded to the nearest, ties to even; subnormal numbers become 0.
template <class V>
FRNN_FN void store(BFloat16* p, V v, int n) {
  static_assert(Value<V>::kLanes == 16);
  store_halves(p, (__m256i)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)v), n);
}

// The three numbers in bfloat16 of which each number is the sum: each takes what the ones before it
// leave, rounded, all 24 bits together. But numbers under 2^-110 lose what lies under 2^-126, and
// what is infinite or rounds to that becomes NaN.
struct Parts {
  __m256i part[3];

  template <class V>
  FRNN_FN explicit Parts(V x) {
    for (__m256i& some : part) {
      some = (__m256i)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)x);
      x -= widen<V>(some);
    }
  }
};

}  // namespace amx
}  // namespace frnn
