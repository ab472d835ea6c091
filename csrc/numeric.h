// SPDX-License-Identifier: Apache-2.0
// Elementary functions over a value type V: float, double, or a GCC/clang vector of them.
//
// A cell is written once over V. The CPU engine instantiates it with the vector type of each
// instruction set, the tests with double. Nothing here is an intrinsic: vector extensions compile
// to SSE, AVX, AVX-512 and NEON alike.
//
// Every function is FRNN_FN, that is always inlined, because translation units compiled for
// different instruction sets share this header: the linker would merge out-of-line copies, and a
// machine without AVX-512 could end up calling the AVX-512 one. For the same reason no function
// template of the standard library is called.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define FRNN_FN __host__ __device__ __forceinline__
#else
#define FRNN_FN inline __attribute__((always_inline))
#endif

namespace frnn {

template <class T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};
// A SIMD vector of kLanes values of T.
template <class T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

// What a value type is made of: its scalar, its width, and the unsigned integers of its layout.
template <class V>
struct Value {
  using Scalar = std::remove_cvref_t<decltype(V{}[0])>;
  static constexpr int kLanes = sizeof(V) / sizeof(Scalar);
  using Bits = Vector<std::conditional_t<sizeof(Scalar) == 4, uint32_t, uint64_t>, kLanes>;
};
template <>
struct Value<float> {
  using Scalar = float;
  using Bits = uint32_t;
  static constexpr int kLanes = 1;
};
template <>
struct Value<double> {
  using Scalar = double;
  using Bits = uint64_t;
  static constexpr int kLanes = 1;
};

template <class V>
using Scalar = typename Value<V>::Scalar;

// ---- Memory. The address needs no alignment beyond that of one scalar.

// A vector may alias its scalars, and nothing else: unlike after a memcpy, the compiler need not
// read all pointers again after every store.
template <class V>
struct Unaligned {
  typedef V type __attribute__((aligned(alignof(Scalar<V>))));
};

template <class V>
FRNN_FN V load(const Scalar<V>* p) {
  return *reinterpret_cast<const typename Unaligned<V>::type*>(p);
}

template <class V>
FRNN_FN void store(Scalar<V>* p, V v) {
  *reinterpret_cast<typename Unaligned<V>::type*>(p) = v;
}

// The first n lanes only, 0 < n <= kLanes; the other lanes are read as zero and never written.
template <class V>
FRNN_FN V load(const Scalar<V>* p, int n) {
  if (n == Value<V>::kLanes) return load<V>(p);
  V v{};
  __builtin_memcpy(&v, p, n * sizeof(Scalar<V>));
  return v;
}

template <class V>
FRNN_FN void store(Scalar<V>* p, V v, int n) {
  if (n == Value<V>::kLanes) return store(p, v);
  __builtin_memcpy(p, &v, n * sizeof(Scalar<V>));
}

template <class V>
FRNN_FN V broadcast(Scalar<V> x) {
  return x - V{};  // x + V{} would turn -0 into 0
}

// ---- sigmoid, tanh. NaN gives NaN; infinities give the limits.

template <class T>
struct ExpConstants;

// (e^r - 1 - r) / r^2 on |r| <= ln2/2 by polynomials that minimise the error relative to e^r - 1
// (Lawson iteration in 50 digits): 1.3e-8 in float, 1.8e-17 in double.
template <>
struct ExpConstants<float> {
  static constexpr int kMantissa = 23, kBias = 127, kDegree = 4;
  static constexpr float kPolynomial[kDegree + 1] = {0.4999999815f, 0.1666654342f, 0.0416672008f,
                                                     0.008366547446f, 0.001388251072f};
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;  // 9 bits, so that n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLargest = 88.8f, kSmallest = -86.9f, kTanhIsOne = 10.0f;
};
template <>
struct ExpConstants<double> {
  static constexpr int kMantissa = 52, kBias = 1023, kDegree = 9;
  static constexpr double kPolynomial[kDegree + 1] = {
      0.50000000000000052008,     0.16666666666666588967,   0.041666666666576460008,
      0.008333333333389730174,    0.0013888888931669208698, 0.00019841269718722914926,
      0.000024801505140556692049, 2.7557407671862600482e-6, 2.7626093574876160369e-7,
      2.5053781012006430041e-8};
  static constexpr double kLog2e = 1.4426950408889634074;
  static constexpr double kLn2High = 6.93147180369123816490e-01;  // 33 bits
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLargest = 709.8, kSmallest = -708.0, kTanhIsOne = 20.0;
};

// e^x = scale * (1 + m) with scale = 2^n and |m| < 0.42, for x within [kSmallest, kLargest]; near
// kLargest scale is infinite.
template <class V>
struct ExpParts {
  V scale, m;
};

template <class V>
FRNN_FN ExpParts<V> exp_parts(V x) {
  using C = ExpConstants<Scalar<V>>;
  using Bits = typename Value<V>::Bits;
  const V shifted = x * C::kLog2e + C::kRound;
  const V n = shifted - C::kRound;
  const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
  V p = broadcast<V>(C::kPolynomial[C::kDegree]);
#pragma GCC unroll 16
  for (int i = C::kDegree - 1; i >= 0; --i) p = p * r + C::kPolynomial[i];
  // The low mantissa bits of `shifted` are the integer n; the rest of its pattern is shifted out.
  const Bits exponent = __builtin_bit_cast(Bits, shifted) + Bits(Bits{} + C::kBias);
  return {__builtin_bit_cast(V, Bits(exponent << C::kMantissa)), r + (r * r) * p};
}

// x limited to [low, high]; NaN stays NaN because no comparison with it holds.
template <class V>
FRNN_FN V clamp(V x, Scalar<V> low, Scalar<V> high) {
  x = x < low ? broadcast<V>(low) : x;
  return x > high ? broadcast<V>(high) : x;
}

// 1 / (1 + e^-x), within 3 ulp; values under the smallest normal number may become 0.
template <class V>
FRNN_FN V sigmoid(V x) {
  using C = ExpConstants<Scalar<V>>;
  const ExpParts<V> e = exp_parts(clamp(V(-x), C::kSmallest, C::kLargest));
  return 1.0f / (e.scale * (e.m + 1.0f) + 1.0f);
}

// (e^2|x| - 1) / (e^2|x| + 1) with the sign of x, within 3 ulp. e^y - 1 is formed from the
// polynomial without rounding e^y first, so that small x keep their relative accuracy.
template <class V>
FRNN_FN V tanh(V x) {
  using C = ExpConstants<Scalar<V>>;
  const V magnitude = x < 0.0f ? -x : x;
  const V limited = magnitude > C::kTanhIsOne ? broadcast<V>(C::kTanhIsOne) : magnitude;
  const ExpParts<V> e = exp_parts(V(limited + limited));
  const V minus_one = e.scale * e.m + (e.scale - 1.0f);
  const V result = minus_one / (minus_one + 2.0f);
  return x < 0.0f ? -result : result;
}

}  // namespace frnn
