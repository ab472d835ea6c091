// SPDX-License-Identifier: Apache-2.0
#include "checks.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "device_array.h"

namespace frnn::checks {
namespace {

using namespace frnn::cuda;

// ---- Tensor cores: small integers, whose products and sums are exact in every format.

enum class Type { kBf16, kF16, kTf32 };

template <Type kType>
__global__ void multiply(const float* a, const float* b, float* d) {
  constexpr int kK = kType == Type::kTf32 ? 8 : 16;
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, q = lane % 4;
  float sum[4] = {1, 2, 3, 4};
  uint32_t x[4], y[2];
  auto pair = [](float low, float high) {
    return kType == Type::kBf16 ? pack_bf16(low, high) : pack_f16(low, high);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i % 2);
    if (kType == Type::kTf32) {
      x[i] = to_tf32(a[row * kK + q + 4 * (i / 2)]);
    } else {
      const float* p = a + row * kK + 2 * q + 8 * (i / 2);
      x[i] = pair(p[0], p[1]);
    }
  }
  for (int i = 0; i < 2; ++i) {
    if (kType == Type::kTf32) {
      y[i] = to_tf32(b[(q + 4 * i) * 8 + g]);
    } else {
      const float* p = b + (2 * q + 8 * i) * 8 + g;
      y[i] = pair(p[0], p[8]);
    }
  }
  if constexpr (kType == Type::kBf16) mma_bf16(sum, x, y);
  if constexpr (kType == Type::kF16) mma_f16(sum, x, y);
  if constexpr (kType == Type::kTf32) mma_tf32(sum, x, y);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = sum[i];
}

__global__ void multiply_f64(const double* a, const double* b, double* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, q = lane % 4;
  double sum[2] = {1, 2};
  mma_f64(sum, a[g * 4 + q], b[q * 8 + g]);
  for (int i = 0; i < 2; ++i) d[g * 8 + 2 * q + i] = sum[i];
}

// f(row, column) is what the accumulator held.
template <class T, class F>
void compare_product(const std::vector<T>& a, const std::vector<T>& b, const std::vector<T>& d,
                     int k, F initial) {
  for (int i = 0; i < static_cast<int>(d.size()); ++i) {
    T sum = initial(i / 8, i % 8);
    for (int j = 0; j < k; ++j) sum += a[i / 8 * k + j] * b[j * 8 + i % 8];
    if (d[i] != sum) throw std::runtime_error("a product differs from the loop");
  }
}

template <Type kType>
std::vector<float> product(const std::vector<float>& a, const std::vector<float>& b) {
  DeviceArray in_a(a), in_b(b);
  auto d = poison<float>(16 * 8);
  launch("multiply", multiply<kType>, Launch{dim3(1), dim3(32)}, in_a.get(), in_b.get(), d.get());
  return d.read();
}

template <Type kType>
Answer check_multiply() {
  constexpr int kK = kType == Type::kTf32 ? 8 : 16;
  std::vector<float> a(16 * kK), b(kK * 8);
  for (int i = 0; i < 16 * kK; ++i) a[i] = static_cast<float>(i * 37 % 31 - 15);
  for (int i = 0; i < kK * 8; ++i) b[i] = static_cast<float>(i * 53 % 29 - 14);
  const auto d = product<kType>(a, b);
  compare_product(a, b, d, kK, [](int i, int j) { return 1.0f + 2 * (i / 8) + j % 2; });
  return answer(d);
}

// Positive values of many magnitudes: a sum of 16 products and the accumulator, each cut to 24 bits
// of the largest, is at most 17 units off.
template <Type kType>
Answer check_sums() {
  constexpr int kK = kType == Type::kTf32 ? 8 : 16, kUlp = 17;
  auto value = [](int i) { return std::ldexp(static_cast<float>(128 + i * 37 % 128), -7 - i % 9); };
  std::vector<float> a(16 * kK), b(kK * 8);
  for (int i = 0; i < 16 * kK; ++i) a[i] = value(i);
  for (int i = 0; i < kK * 8; ++i) b[i] = value(7 * i + 3);
  const auto d = product<kType>(a, b);
  for (int i = 0; i < 16 * 8; ++i) {
    double sum = 1.0 + 2 * (i / 64) + i % 2;
    for (int j = 0; j < kK; ++j) sum += double{a[i / 8 * kK + j]} * b[j * 8 + i % 8];
    if (!(std::abs(d[i] - sum) <= kUlp * 0x1p-23 * sum)) {
      throw std::runtime_error("a sum of products is too far from the loop's");
    }
  }
  return answer(d, 2 * kUlp);
}

Answer check_multiply_f64() {
  std::vector<double> a(32), b(32);
  for (int i = 0; i < 32; ++i) a[i] = i * 37 % 31 - 15, b[i] = i * 53 % 29 - 14;
  DeviceArray in_a(a), in_b(b);
  auto out = poison<double>(64);
  launch("multiply_f64", multiply_f64, Launch{dim3(1), dim3(32)}, in_a.get(), in_b.get(),
         out.get());
  const auto d = out.read();
  compare_product(a, b, d, 4, [](int, int j) { return 1.0 + j % 2; });
  return answer(d);
}

// ---- ldmatrix and movmatrix. out: [13][32] registers of four matrices and a transposed one, of
// four with ldmatrix_trans, and of two with either.
__global__ void matrices(uint32_t* out) {
  FRNN_SHARED(uint16_t, tile, 4 * 64);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 4 * 64; i += 32) tile[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t r[4];
  ldmatrix(r, tile + 8 * lane);
  for (int i = 0; i < 4; ++i) out[i * 32 + lane] = r[i];
  out[4 * 32 + lane] = movmatrix_trans(r[0]);
  ldmatrix_trans(r, tile + 8 * lane);
  for (int i = 0; i < 4; ++i) out[(5 + i) * 32 + lane] = r[i];
  uint32_t two[2];
  ldmatrix(two, tile + 8 * (lane % 16));
  for (int i = 0; i < 2; ++i) out[(9 + i) * 32 + lane] = two[i];
  ldmatrix_trans(two, tile + 8 * (lane % 16));
  for (int i = 0; i < 2; ++i) out[(11 + i) * 32 + lane] = two[i];
}

Answer check_matrices() {
  auto array = poison<uint32_t>(13 * 32);
  launch("matrices", matrices, Launch{dim3(1), dim3(32)}, array.get());
  const auto out = array.read();
  constexpr int kMatrix[] = {0, 1, 2, 3, 0, 0, 1, 2, 3, 0, 1, 0, 1};
  for (int i = 0; i < 13 * 32; ++i) {
    const int lane = i % 32, row = lane / 4, column = lane % 4 * 2, part = i / 32;
    const bool transposed = (part >= 4 && part < 9) || part >= 11;
    const int matrix = kMatrix[part];
    auto value = [&](int c) {
      return static_cast<uint32_t>(64 * matrix + (transposed ? 8 * c + row : 8 * row + c));
    };
    if (out[i] != (value(column) | value(column + 1) << 16)) {
      throw std::runtime_error("a matrix differs from the loop");
    }
  }
  return answer(out);
}

// ---- Conversions. out: [3][n], of the tf32 the bits that mma reads.
__global__ void convert(const float* in, uint32_t* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    out[i] = pack_bf16(in[i], in[n - 1 - i]);
    out[n + i] = pack_f16(in[i], in[n - 1 - i]);
    out[2 * n + i] = to_tf32(in[i]) & 0xffffe000u;
  }
}

// x as a float of so many mantissa bits and its bias, to nearest, ties to even.
uint32_t rounded(float x, int mantissa, int bias) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0, infinity = (2u * bias + 1) << mantissa;
  if (x == 0) return sign;
  if (std::isinf(x)) return sign | infinity;
  const int exponent = max(std::ilogb(x), 1 - bias);
  const double units = std::nearbyint(std::ldexp(std::abs(double{x}), mantissa - exponent));
  // A subnormal has no leading one, which the exponent's field 1 stands for.
  const auto bits = static_cast<uint32_t>(((exponent + bias - 1) << mantissa) + units);
  return sign | min(bits, infinity);
}

Answer check_conversions() {
  std::vector<float> in = {0, -0.0f, 1, 65519, 65520, 3.4e38f, 1e-45f, -INFINITY, INFINITY, NAN};
  for (uint32_t i = 0; i < 243; ++i) {
    uint32_t bits = i * 2654435761u;  // some halfway between two of a format
    if (i % 3 == 1) bits = (bits & 0xffff0000u) | 0x8000u;
    if (i % 3 == 2) bits = (bits & 0xffffe000u) | 0x1000u;
    if (i % 2 == 0) bits = (bits & 0x807fffffu) | (100 + i % 45) << 23;  // near half's range
    float x;
    std::memcpy(&x, &bits, 4);
    if (!std::isnan(x)) in.push_back(x);
  }
  const int n = static_cast<int>(in.size());
  DeviceArray values(in);
  auto array = poison<uint32_t>(3 * in.size());
  launch("convert", convert, Launch{dim3(1), dim3(32)}, values.get(), array.get(), n);
  auto out = array.read();
  for (int i = 0; i < n; ++i) {
    const float low = in[i], high = in[n - 1 - i];
    uint32_t bits;
    std::memcpy(&bits, &low, 4);
    if (std::isnan(low)) out[2 * n + i] = 0;  // which NaN is open
    const uint32_t tf32 = std::isnan(low)   ? 0
                          : std::isinf(low) ? bits
                                            : (bits + 0x1000u) & 0xffffe000u;
    if (out[i] != (rounded(low, 7, 127) | rounded(high, 7, 127) << 16) ||
        out[n + i] != (rounded(low, 10, 15) | rounded(high, 10, 15) << 16) ||
        out[2 * n + i] != tf32) {
      throw std::runtime_error("a conversion differs from the loop");
    }
  }
  return answer(out);
}

// ---- Functions, with the error that primitives.h promises.
enum class Function { kTanh, kExp2, kReciprocal };

template <Function kFunction>
__global__ void apply(const float* in, float* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    out[i] = kFunction == Function::kTanh   ? tanh_approx(in[i])
             : kFunction == Function::kExp2 ? exp2_approx(in[i])
                                            : reciprocal_approx(in[i]);
  }
}

template <Function kFunction>
Answer check_function() {
  constexpr bool kTanh = kFunction == Function::kTanh, kExp2 = kFunction == Function::kExp2;
  std::vector<float> in = {0, INFINITY, -INFINITY};
  for (int i = 0; i < 250; ++i) {
    in.push_back(kTanh ? std::ldexp(1 + i / 250.0f, i % 20 - 15) * (i % 2 ? 1 : -1) : i - 125.3f);
  }
  if (kExp2) in.push_back(-130);  // a subnormal result becomes 0
  DeviceArray values(in);
  auto array = poison<float>(in.size());
  launch("apply", apply<kFunction>, Launch{dim3(1), dim3(32)}, values.get(), array.get(),
         static_cast<int>(in.size()));
  const auto out = array.read();
  for (size_t i = 0; i < in.size(); ++i) {
    const double x = in[i];
    const double exact = kTanh ? std::tanh(x) : !kExp2 ? 1 / x : x == -130 ? 0 : std::exp2(x);
    const double bound = (kTanh ? 0x1p-11 : 0x1p-22) * std::abs(exact);
    if (out[i] != exact && !(std::abs(out[i] - exact) <= bound)) {
      throw std::runtime_error("a function is less exact than promised");
    }
  }
  // The simulator's tanh is wrong by 2^-12; the others are the library's, within one unit.
  return answer(out, kTanh ? (0x1p-11 + 0x1p-12) * 0x1p24 + 1 : 3);
}

// ---- Shuffles and votes. out: [5][32].
__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_xor_sync(0xffffffffu, lane, 5);
  out[32 + lane] = __shfl_down_sync(0xffffffffu, lane, 3);
  out[64 + lane] = __shfl_up_sync(0xffffffffu, lane, 3);
  out[96 + lane] = __shfl_sync(0xffffffffu, lane, 9, 8);
  out[128 + lane] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
}

Answer check_shuffles() {
  auto array = poison<int>(5 * 32);
  launch("shuffles", shuffles, Launch{dim3(1), dim3(32)}, array.get());
  const auto out = array.read();
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane += 3) votes |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane) {
    const int expected[] = {lane ^ 5, lane < 29 ? lane + 3 : lane, lane > 2 ? lane - 3 : lane,
                            lane / 8 * 8 + 1, static_cast<int>(votes)};
    for (int i = 0; i < 5; ++i) {
      if (out[32 * i + lane] != expected[i]) throw std::runtime_error("a shuffle is wrong");
    }
  }
  return answer(out);
}

}  // namespace

Answer run(int check) {
  constexpr Answer (*kChecks[])() = {check_multiply<Type::kBf16>,
                                     check_multiply<Type::kF16>,
                                     check_multiply<Type::kTf32>,
                                     check_multiply_f64,
                                     check_sums<Type::kBf16>,
                                     check_sums<Type::kF16>,
                                     check_sums<Type::kTf32>,
                                     check_matrices,
                                     check_conversions,
                                     check_function<Function::kTanh>,
                                     check_function<Function::kExp2>,
                                     check_function<Function::kReciprocal>,
                                     check_shuffles};
  constexpr int kMine = sizeof(kChecks) / sizeof(*kChecks);
  return check < kMine ? kChecks[check]() : run_exchange(check - kMine);
}

}  // namespace frnn::checks
