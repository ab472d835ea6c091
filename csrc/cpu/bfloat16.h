// SPDX-License-Identifier: Apache-2.0
// sigmoid and tanh of 16 numbers, no more exact than what is stored in bfloat16 deserves. Included
// by numeric.h in place of its own in the translation unit that has such kernels.
#pragma once

#include <immintrin.h>

namespace frnn {
inline namespace amx {

// 1 / (1 + 2^t), within 2^-23: 2^t by its integer and by a polynomial (Lawson iteration) of what
// remains, within 2^-23.7 of it; the reciprocal by a step of Newton's iteration.
template <class V>
FRNN_FN V falling(V t) {
  // NaN stays NaN. (GCC 12 warns of what the intrinsics without mask leave undefined.)
  const __m512 limited = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(126), (__m512)t);
  const __m512 n = _mm512_maskz_roundscale_ps(0xffff, limited, _MM_FROUND_TO_NEAREST_INT);
  const V r = (V)limited - (V)n;
  const V power = polynomial(r, 1.00000012f, 0.693146944f, 0.240221202f, 0.0555071309f,
                             0.00967554189f, 0.00132764725f);
  const V d = (V)_mm512_maskz_scalef_ps(0xffff, (__m512)power, n) + 1.0f;
  const V first = (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);
  return first * (2.0f - d * first);
}

template <class V>
FRNN_FN V sigmoid(V x) {
  return falling(V(x * -1.44269504f));
}

// Within 2^-22: the error is an absolute one, near 0 too.
template <class V>
FRNN_FN V tanh(V x) {
  return 1.0f - 2.0f * falling(V(x * 2.88539008f));
}

}  // namespace amx
}  // namespace frnn
