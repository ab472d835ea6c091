// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 numbers in bfloat16, as they are or in parts. For the translation units compiled
// for AMX.
#pragma once

#include <immintrin.h>

#include "numeric.h"

namespace frnn {
inline namespace amx {

// Of 16 numbers of 16 bits, each in the lower half of 32. GCC makes four instructions of a
// conversion of vectors.
FRNN_FN __m512i lower_halves(__m256i halves) { return _mm512_maskz_cvtepu16_epi32(0xffff, halves); }
FRNN_FN __m512i upper_halves(__m256i halves) {
  return _mm512_maskz_slli_epi32(0xffff, lower_halves(halves), 16);
}

template <class V>
FRNN_FN V widen(__m256i halves) {
  static_assert(Value<V>::kLanes == 16);
  return (V)upper_halves(halves);
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

// To the nearest, ties to even; subnormal numbers become 0.
template <class V>
FRNN_FN __m256i rounded(V x) {
  static_assert(Value<V>::kLanes == 16);
  return (__m256i)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)x);
}
// .. two vectors side by side.
template <class V>
FRNN_FN __m512i rounded(V low, V high) {
  return (__m512i)_mm512_maskz_cvtne2ps_pbh(0xffffffff, (__m512)high, (__m512)low);
}

template <class V>
FRNN_FN void store(BFloat16* p, V v, int n) {
  store_halves(p, rounded(v), n);
}

// The three numbers in bfloat16 of which each number is the sum: each takes what the ones before it
// leave, rounded, all 24 bits together. But numbers under 2^-110 lose what lies under 2^-126, and
// what is infinite or rounds to that becomes NaN.
struct Parts {
  __m256i part[3];

  template <class V>
  FRNN_FN explicit Parts(V x) {
    for (__m256i& some : part) {
      some = rounded(x);
      x -= widen<V>(some);
    }
  }
};

// .. of two vectors side by side.
struct PartsOfTwo {
  __m512i part[3];

  template <class V>
  FRNN_FN PartsOfTwo(V low, V high) {
    for (__m512i& some : part) {
      some = rounded(low, high);
      low -= widen<V>(_mm512_maskz_extracti64x4_epi64(0xff, some, 0));
      high -= widen<V>(_mm512_maskz_extracti64x4_epi64(0xff, some, 1));
    }
  }
};

}  // namespace amx
}  // namespace frnn
