// SPDX-License-Identifier: Apache-2.0
#include "checks.h"

#include <cmath>
#include <stdexcept>
#include <vector>

#include "cuda/primitives.h"

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
void check_multiply() {
  constexpr int kK = kType == Type::kTf32 ? 8 : 16;
  std::vector<float> a(16 * kK), b(kK * 8), d(16 * 8);
  for (int i = 0; i < 16 * kK; ++i) a[i] = static_cast<float>(i * 37 % 31 - 15);
  for (int i = 0; i < kK * 8; ++i) b[i] = static_cast<float>(i * 53 % 29 - 14);
  launch("multiply", multiply<kType>, Launch{dim3(1), dim3(32)}, a.data(), b.data(), d.data());
  compare_product(a, b, d, kK, [](int i, int j) { return 1.0f + 2 * (i / 8) + j % 2; });
}

void check_multiply_f64() {
  std::vector<double> a(32), b(32), d(64);
  for (int i = 0; i < 32; ++i) a[i] = i * 37 % 31 - 15, b[i] = i * 53 % 29 - 14;
  launch("multiply_f64", multiply_f64, Launch{dim3(1), dim3(32)}, a.data(), b.data(), d.data());
  compare_product(a, b, d, 4, [](int, int j) { return 1.0 + j % 2; });
}

// ---- ldmatrix and movmatrix. out: [5][32] registers of four matrices and a transposed one, then
// the same with ldmatrix_trans.
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
}

void check_matrices() {
  std::vector<uint32_t> out(9 * 32);
  launch("matrices", matrices, Launch{dim3(1), dim3(32)}, out.data());
  for (int i = 0; i < 9 * 32; ++i) {
    const int lane = i % 32, row = lane / 4, column = lane % 4 * 2, part = i / 32;
    const bool transposed = part >= 4;
    const int matrix = part < 4 ? part : part == 4 ? 0 : part - 5;
    auto value = [&](int c) {
      return static_cast<uint32_t>(64 * matrix + (transposed ? 8 * c + row : 8 * row + c));
    };
    if (out[i] != (value(column) | value(column + 1) << 16)) {
      throw std::runtime_error("a matrix differs from the loop");
    }
  }
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

void check_shuffles() {
  std::vector<int> out(5 * 32);
  launch("shuffles", shuffles, Launch{dim3(1), dim3(32)}, out.data());
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane += 3) votes |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane) {
    const int expected[] = {lane ^ 5, lane < 29 ? lane + 3 : lane, lane > 2 ? lane - 3 : lane,
                            lane / 8 * 8 + 1, static_cast<int>(votes)};
    for (int i = 0; i < 5; ++i) {
      if (out[32 * i + lane] != expected[i]) throw std::runtime_error("a shuffle is wrong");
    }
  }
}

// ---- cp.async of each size and with zero fill, in dynamic shared memory. out: [128] bytes.
__global__ void copies(const unsigned char* in, unsigned char* out) {
  FRNN_DYN_SMEM(smem);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 4) {
    cp_async<16>(smem + 16 * lane, in + 16 * lane);
  } else if (lane < 8) {
    cp_async<8>(smem + 64 + 8 * (lane - 4), in + 64 + 8 * (lane - 4));
  } else if (lane < 16) {
    cp_async<4>(smem + 96 + 4 * (lane - 8), in + 96 + 4 * (lane - 8), lane - 12 > 0 ? 4 : 2);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = lane; i < 128; i += 32) out[i] = smem[i];
}

void check_copies() {
  std::vector<unsigned char> in(128), out(128);
  for (int i = 0; i < 128; ++i) in[i] = static_cast<unsigned char>(i + 1);
  Launch how{dim3(1), dim3(32)};
  how.smem = 128;
  launch("copies", copies, how, in.data(), out.data());
  for (int i = 0; i < 128; ++i) {
    const bool filled = i >= 96 && i < 96 + 4 * 5 && i % 4 >= 2;
    if (out[i] != (filled ? 0 : in[i])) throw std::runtime_error("a copy is wrong");
  }
}

// ---- One warp hands on to another by bar.arrive and bar.sync.
__global__ void named_barriers(int* out) {
  FRNN_SHARED(int, value, 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x < 32) {
    value[lane] = 3 * lane;
    bar_arrive(1, 64);
  } else {
    bar_sync(1, 64);
    out[lane] = value[31 - lane];
  }
}

void check_named_barriers() {
  std::vector<int> out(32);
  launch("named_barriers", named_barriers, Launch{dim3(1), dim3(64)}, out.data());
  for (int i = 0; i < 32; ++i) {
    if (out[i] != 3 * (31 - i)) throw std::runtime_error("a named barrier let a thread pass");
  }
}

}  // namespace

void run(int check) {
  constexpr void (*kChecks[])() = {check_multiply<Type::kBf16>,
                                   check_multiply<Type::kF16>,
                                   check_multiply<Type::kTf32>,
                                   check_multiply_f64,
                                   check_matrices,
                                   check_shuffles,
                                   check_copies,
                                   check_named_barriers};
  static_assert(sizeof(kChecks) / sizeof(*kChecks) == sizeof(kNames) / sizeof(*kNames));
  kChecks[check]();
}

}  // namespace frnn::checks
