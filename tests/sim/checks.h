// SPDX-License-Identifier: Apache-2.0
// One kernel per group of primitives, compared with plain loops: run by the simulator here, and on
// a device to confirm the simulator.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace frnn::checks {

constexpr const char* kNames[] = {
    "mma_bf16",   "mma_f16",  "mma_tf32",       "mma_f64",    "sums_bf16", "sums_f16",
    "sums_tf32",  "matrices", "conversions",    "tanh",       "exp2",      "reciprocal",
    "shuffles",   "copies",   "named_barriers", "words",      "messages",  "clocks",
    "dependency", "bulk",     "cluster",        "store_async"};
constexpr int kCount = sizeof(kNames) / sizeof(*kNames);

// What a kernel computed. A device's words are those of the simulator; where `ulp` is not 0 they
// are floats, and so many units in the last place of the simulator's.
struct Answer {
  std::vector<uint32_t> words;
  int ulp = 0;
};

template <class T>
Answer answer(const std::vector<T>& values, int ulp = 0) {
  Answer a{std::vector<uint32_t>(values.size() * sizeof(T) / 4), ulp};
  std::memcpy(a.words.data(), values.data(), 4 * a.words.size());
  return a;
}

// Throws, with a sentence, if the primitives do not do what the loops do.
Answer run(int check);
Answer run_exchange(int check);  // those from "copies" on, counted from it

}  // namespace frnn::checks
