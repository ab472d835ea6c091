// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al. 2011): random numbers from a counter and a key, the same on every
// device and in any order.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace frnn {

// Those of as many counters as there are lanes, which compilers make into vectors.
template <int kLanes>
struct PhiloxWords {
  uint32_t word[4][kLanes];
};

// From counters to random words.
template <int kLanes>
FRNN_FN void philox(PhiloxWords<kLanes>& words, uint64_t key) {
  uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  auto& c = words.word;
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t a = uint64_t{0xD2511F53} * c[0][i], b = uint64_t{0xCD9E8D57} * c[2][i];
      const uint32_t c0 = static_cast<uint32_t>(b >> 32) ^ c[1][i] ^ low;
      const uint32_t c2 = static_cast<uint32_t>(a >> 32) ^ c[3][i] ^ high;
      c[1][i] = static_cast<uint32_t>(b);
      c[3][i] = static_cast<uint32_t>(a);
      c[0][i] = c0;
      c[2][i] = c2;
    }
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
}

}  // namespace frnn
