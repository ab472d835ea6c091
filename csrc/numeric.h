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

// Storage in another type than V's scalars, one value at a time.
template <class V, class S>
  requires(Value<V>::kLanes == 1 && !std::is_same_v<S, Scalar<V>>)
FRNN_FN V load(const S* p, int) {
  return static_cast<V>(*p);
}

template <class V, class S>
  requires(Value<V>::kLanes == 1 && !std::is_same_v<S, Scalar<V>>)
FRNN_FN void store(S* p, V v, int) {
  *p = static_cast<S>(v);
}

// Storage in bfloat16, the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

// What values stored as S are computed in, and what must not be rounded to S is stored as.
template <class S>
struct WideOf {
  using type = S;
};
template <>
struct WideOf<BFloat16> {
  using type = float;
};
template <class S>
using Wide = typename WideOf<S>::type;

// n bytes as numbers, the other lanes 0.
template <class V>
FRNN_FN V load_bytes(const uint8_t* p, int n) {
  constexpr int kLanes = Value<V>::kLanes;
  if constexpr (kLanes == 1) {
    return static_cast<V>(*p);
  } else {
    Vector<uint8_t, kLanes> bytes{};
    if (n == kLanes) {
      __builtin_memcpy(&bytes, p, kLanes);
    } else {
      __builtin_memcpy(&bytes, p, n);
    }
    return __builtin_convertvector(__builtin_convertvector(bytes, Vector<int32_t, kLanes>), V);
  }
}

template <class V>
FRNN_FN V broadcast(Scalar<V> x) {
  return x - V{};  // x + V{} would turn -0 into 0
}

// The lanes of a and, beyond them, of b that kIndex names.
template <int... kIndex, class V>
FRNN_FN V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else  // which has the other one from version 12 on
  return __builtin_shuffle(a, b, typename Value<V>::Bits{kIndex...});
#endif
}

// ---- sigmoid, tanh. NaN gives NaN; infinities give the limits.

// c0 + c1 x + ..
template <class V>
FRNN_FN V polynomial(V, Scalar<V> c) {
  return broadcast<V>(c);
}
template <class V, class... C>
FRNN_FN V polynomial(V x, Scalar<V> c, C... rest) {
  return polynomial(x, rest...) * x + c;
}

}  // namespace frnn

#if defined(FRNN_BFLOAT16)
#include "cpu/bfloat16.h"
#else

namespace frnn {

// Polynomials by Lawson iteration in 50 digits. exp_tail is (e^r - 1 - r) / r^2 on |r| <= ln2/2;
// relative to e^r - 1 its error is 1.3e-8 in float, 1.8e-17 in double. tanh_tail is
// (tanh(x) - x) / x^3 in x2 = x^2 on |x| <= 0.625; relative to tanh(x): 4.4e-9 and 1.0e-17.
template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  template <class V>
  FRNN_FN static V exp_tail(V r) {
    return polynomial(r, 0.4999999815f, 0.1666654342f, 0.0416672008f, 0.008366547446f,
                      0.001388251072f);
  }
  template <class V>
  FRNN_FN static V tanh_tail(V x2) {
    return polynomial(x2, -0.3333328194f, 0.13331442156f, -0.053739712056f, 0.020639078449f,
                      -0.0057049780772f);
  }
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;  // 9 bits, so that n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLargest = 88.8f, kSmallest = -86.9f;
};
template <>
struct Constants<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  template <class V>
  FRNN_FN static V exp_tail(V r) {
    return polynomial(r, 0.50000000000000052008, 0.16666666666666588967, 0.041666666666576460008,
                      0.008333333333389730174, 0.0013888888931669208698, 0.00019841269718722914926,
                      0.000024801505140556692049, 2.7557407671862600482e-6,
                      2.7626093574876160369e-7, 2.5053781012006430041e-8);
  }
  template <class V>
  FRNN_FN static V tanh_tail(V x2) {
    return polynomial(x2, -0.33333333333332855243, 0.13333333333262088958, -0.053968253931266772715,
                      0.021869487576076014545, -0.0088632210024128102355, 0.0035919891722170132245,
                      -0.0014549588704285590817, 0.00058631651730852488023,
                      -0.00022856416746185350786, 0.000077144319803766954723,
                      -0.000016072547947184083844);
  }
  static constexpr double kLog2e = 1.4426950408889634074;
  static constexpr double kLn2High = 6.93147180369123816490e-01;  // 33 bits
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLargest = 709.8, kSmallest = -708.0;
};

// e^x with x limited to [kSmallest, kLargest], where it is about the smallest normal number and
// infinite; kNegative: it may be negative. NaN stays NaN because no comparison with it holds.
template <bool kNegative = true, class V>
FRNN_FN V exp(V x) {
  using C = Constants<Scalar<V>>;
  using Bits = typename Value<V>::Bits;
  if (kNegative) x = x < C::kSmallest ? broadcast<V>(C::kSmallest) : x;
  x = x > C::kLargest ? broadcast<V>(C::kLargest) : x;
  const V shifted = x * C::kLog2e + C::kRound;
  const V n = shifted - C::kRound;
  const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
  // The low mantissa bits of `shifted` are the integer n; the rest of its pattern is shifted out.
  const Bits exponent = __builtin_bit_cast(Bits, shifted) + Bits(Bits{} + C::kBias);
  const V power = __builtin_bit_cast(V, Bits(exponent << C::kMantissa));  // 2^n
  return power * (r + (r * r) * C::exp_tail(r) + 1.0f);
}

// 1 / (1 + e^-x), within 3 ulp; values under the smallest normal number may become 0.
template <class V>
FRNN_FN V sigmoid(V x) {
  return 1.0f / (exp(V(-x)) + 1.0f);
}

// Within 1.5 ulp: the derivative 1 - tanh^2 of a saturated unit, formed from the result, magnifies
// an error in it.
template <class V>
FRNN_FN V tanh(V x) {
  using Bits = typename Value<V>::Bits;
  constexpr auto kSign = typename Value<Scalar<V>>::Bits{1} << (8 * sizeof(Scalar<V>) - 1);
  const Bits sign = __builtin_bit_cast(Bits, x) & kSign;
  const V magnitude = __builtin_bit_cast(V, Bits(__builtin_bit_cast(Bits, x) ^ sign));
  const V tail = 1.0f - 2.0f * (1.0f / (exp<false>(V(2.0f * magnitude)) + 1.0f));
  const V square = x * x;
  const V near_zero = x + x * square * Constants<Scalar<V>>::tanh_tail(square);
  const V with_sign = __builtin_bit_cast(V, Bits(__builtin_bit_cast(Bits, tail) | sign));
  return magnitude < Scalar<V>(0.625) ? near_zero : with_sign;
}

}  // namespace frnn

#endif
