// SPDX-License-Identifier: Apache-2.0
#include "cpu/mask.h"

#include "philox.h"

namespace frnn::cpu {
namespace {

// Groups of four from which on a thread more pays.
constexpr int64_t kGroupsPerSlice = 4096;

template <class T>
void fill(const MaskArgs<T>& args, const Pool& pool) {
  struct Context {
    const MaskArgs<T>& a;
    int64_t groups;
    int slices;
  } context{args, (args.count + 3) / 4, 1};
  const int64_t most = 1 + context.groups / kGroupsPerSlice;
  context.slices = static_cast<int>(most < pool.threads ? most : pool.threads);
  const auto body = [](int64_t begin, int64_t end, void* pointer) {
    const auto& [a, groups, slices] = *static_cast<const Context*>(pointer);
    for (int64_t i = groups * begin / slices; i < groups * end / slices; ++i) {
      const auto low = static_cast<uint32_t>(i), high = static_cast<uint32_t>(i >> 32);
      const PhiloxWords words = philox({{low, high, a.place, a.kind}}, a.seed);
      for (int64_t j = 0; j < 4 && 4 * i + j < a.count; ++j) {
        a.mask[4 * i + j] = words.word[j] < a.threshold ? T(0) : a.scale;
      }
    }
  };
  if (context.slices == 1) {
    body(0, 1, &context);
  } else {
    pool.run(context.slices, body, &context);
  }
}

}  // namespace

void mask(const MaskArgs<float>& args, const Pool& pool) { fill(args, pool); }
void mask(const MaskArgs<double>& args, const Pool& pool) { fill(args, pool); }

}  // namespace frnn::cpu
