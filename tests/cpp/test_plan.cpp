// SPDX-License-Identifier: Apache-2.0
// How the standard CUDA kernels divide their products among blocks, for devices that are not here.
// Needs no CUDA, no torch and no test framework: prints what fails, and fails.
#include "cuda/plan.h"

#include <cstdint>
#include <cstdio>

namespace {

using frnn::cuda::Arithmetic;
using frnn::cuda::blocks_of;
using frnn::cuda::Shape;
using frnn::cuda::shape_of;
using frnn::cuda::size_of;
using frnn::cuda::sizes_of;

int failures = 0;

struct Case {
  int64_t rows, units;
  int gates;
  Arithmetic arithmetic;
  int multiprocessors, size;
};

void expect(bool holds, const char* what, const Case& c) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %lld rows, %lld units of %d gates, arithmetic %d, %d multiprocessors\n",
              what, static_cast<long long>(c.rows), static_cast<long long>(c.units), c.gates,
              static_cast<int>(c.arithmetic), c.multiprocessors);
}

constexpr int kA100 = 108, kA10 = 72, kH100 = 132, kH20 = 78, kB200 = 148;
constexpr auto kBf16 = Arithmetic::kBfloat16, kFp32 = Arithmetic::kFloat32;
constexpr int kSmall = 0, kMiddle = 1, kLarge = 2;

// Four gates in forward, three of them in a GRU's, one in backward.
constexpr Case kCases[] = {
    {1, 4096, 4, kBf16, kH100, kSmall},      // one tile of rows: larger blocks read more
    {8, 65536, 4, kBf16, kH100, kSmall},     //
    {8, 65536, 4, kBf16, 1, kSmall},         //
    {128, 128, 4, kBf16, kH100, kMiddle},    // 16 x 16 blocks are two for most of 132, 4 x 16 one
    {32, 256, 4, kBf16, kH100, kSmall},      // 4 x 32 small blocks, one for each
    {32, 256, 4, kBf16, kA10, kMiddle},      // two for each, or one middle one
    {32, 512, 4, kBf16, kH100, kMiddle},     //
    {64, 512, 4, kBf16, kH100, kMiddle},     // 2 x 64
    {128, 512, 4, kBf16, kH100, kMiddle},    // 4 x 64: two for each read as much as a large one
    {128, 1024, 4, kBf16, kH100, kLarge},    // 2 x 64
    {128, 1024, 4, kBf16, kA100, kLarge},    // two for some, which read less than five middle ones
    {128, 1024, 4, kBf16, kB200, kLarge},    //
    {64, 2048, 4, kBf16, kH100, kLarge},     // 1 x 128
    {128, 1024, 3, kBf16, kH100, kLarge},    // GRU
    {128, 1024, 1, kBf16, kH100, kMiddle},   // backward: 4 x 32, and no large blocks
    {8, 1024, 1, kBf16, kH100, kSmall},      // 1 x 64
    {64, 2048, 1, kBf16, kH20, kMiddle},     //
    {128, 1024, 4, kFp32, kH100, kMiddle},   // float32 and float64 have registers for two tiles
    {4096, 4096, 4, kFp32, kH100, kMiddle},  //
};

}  // namespace

int main() {
  for (const Case& c : kCases) {
    const int size = size_of(c.rows, c.units, c.gates, c.arithmetic, c.multiprocessors);
    expect(size == c.size, "size", c);
    const Shape shape = shape_of(c.gates, size, c.arithmetic);
    const auto [x, y] = blocks_of(c.rows, c.units, shape);
    const int64_t rows = shape.tiles * 8, units = shape.groups * 8;
    expect(x * rows >= c.rows && (x - 1) * rows < c.rows, "blocks along rows", c);
    expect(y * units >= c.units && (y - 1) * units < c.units, "blocks along units", c);
  }
  for (int gates = 1; gates <= 4; ++gates) {
    for (int size = 0; size < sizes_of(gates, kBf16); ++size) {
      const Case c{0, 0, gates, kBf16, 0, size};
      expect(shape_of(gates, size, kBf16).groups * gates % 2 == 0, "slots in pairs", c);
    }
  }
  if (failures == 0) std::printf("all good\n");
  return failures == 0 ? 0 : 1;
}
