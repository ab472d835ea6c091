// SPDX-License-Identifier: Apache-2.0
// Between the choice of an algorithm and its launches. One driver per arithmetic: the same text
// (standard.inl, cluster.inl) with other products, in a translation unit of its own, so that they
// are compiled side by side.
#pragma once

#include <initializer_list>

#include "cells/cell.h"
#include "cuda/kernels.h"

namespace frnn::cuda {

struct Standard {
  void (*forward)(int cell, const ForwardSides& sides, void* stream);
  void (*backward)(int cell, const BackwardSides& sides, void* stream);
};

extern const Standard kStandardFloat16;
extern const Standard kStandardBfloat16;
extern const Standard kStandardTf32;
extern const Standard kStandardFloat32;
extern const Standard kStandardFloat64;

// False, and nothing done, if the device has no room for such blocks.
struct Clusters {
  bool (*forward)(int cell, const ForwardSides& sides, const ClusterShape& shape, void* stream);
  bool (*backward)(int cell, const BackwardSides& sides, const ClusterShape& shape, void* stream);
};

struct Grids {
  bool (*forward)(int cell, const ForwardSides& sides, const GridShape& shape, uint32_t* error,
                  void* stream);
  bool (*backward)(int cell, const BackwardSides& sides, const GridShape& shape, uint32_t* error,
                   void* stream);
};

extern const Grids kGridsFloat16;
extern const Grids kGridsBfloat16;
extern const Grids kGridsTf32;

extern const Clusters kClustersFloat16;
extern const Clusters kClustersBfloat16;
extern const Clusters kClustersTf32;

// f.template operator()<Cell>(arguments in the types of the arithmetic M).
template <class M, template <class, class> class Args, class F>
void with_types(int cell, const Sides<Args<void, void>>& sides, const F& f) {
  const auto typed = __builtin_bit_cast(Sides<Args<typename M::S, typename M::V>>, sides);
  PlainCells::dispatch(cell, [&]<class Cell>() { f.template operator()<Cell>(typed); });
}

// The most bytes, 16, 8 or 4, that divide all these sizes and addresses; else 0.
inline int common_unit(std::initializer_list<int64_t> sizes,
                       std::initializer_list<const void*> arrays) {
  uint64_t bits = 16;
  for (const int64_t size : sizes) bits |= static_cast<uint64_t>(size);
  for (const void* array : arrays) bits |= reinterpret_cast<uintptr_t>(array);
  const uint64_t lowest = bits & -bits;
  return lowest < 4 ? 0 : static_cast<int>(lowest);
}

}  // namespace frnn::cuda
