// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al. 2011): random numbers from a counter and a key, the same on every
// device and in any order.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace frnn {

struct PhiloxWords {
  uint32_t word[4];
};

FRNN_FN PhiloxWords philox(PhiloxWords counter, uint64_t key) {
  uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  auto& c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t c0 = static_cast<uint32_t>(b >> 32) ^ c[1] ^ low;
    const uint32_t c2 = static_cast<uint32_t>(a >> 32) ^ c[3] ^ high;
    c[1] = static_cast<uint32_t>(b);
    c[3] = static_cast<uint32_t>(a);
    c[0] = c0;
    c[2] = c2;
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return counter;
}

}  // namespace frnn
