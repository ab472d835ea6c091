// SPDX-License-Identifier: Apache-2.0
// What AVX-512 has an instruction for that vector extensions do not name. Included by numeric.h in
// the translation units compiled for it.
#pragma once

#include <immintrin.h>

namespace frnn {
inline namespace avx512 {

// Within 1 ulp, by a step of Newton's iteration; 0 from 2^126 on.
FRNN_FN Vector<float, 16> reciprocal(Vector<float, 16> x) {
  using V = Vector<float, 16>;
  const __mmask16 small = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(0x1p126f), _CMP_NGE_UQ);
  const V first = (V)_mm512_maskz_rcp14_ps(small, (__m512)x);
  return (V)_mm512_maskz_mul_ps(small, (__m512)first, (__m512)(2.0f - x * first));
}

}  // namespace avx512
}  // namespace frnn
