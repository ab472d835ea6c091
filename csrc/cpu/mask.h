// SPDX-License-Identifier: Apache-2.0
// Masks of dropout, by philox.h.
#pragma once

#include <cstdint>

#include "recurrence.h"

namespace frnn::cpu {

template <class T>
struct MaskArgs {
  T* mask;  // [count] out: element i is from word i % 4 of the counter (i / 4, place, kind)
  int64_t count;
  uint64_t seed;
  uint64_t threshold;  // a word under it gives 0
  T scale;             // what others give
  uint32_t place, kind;
};

void mask(const MaskArgs<float>& args, const Pool& pool);
void mask(const MaskArgs<double>& args, const Pool& pool);

}  // namespace frnn::cpu
