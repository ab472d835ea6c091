// SPDX-License-Identifier: Apache-2.0
// One kernel per group of primitives, compared with plain loops: run by the simulator here, and on
// a device to confirm the simulator.
#pragma once

namespace frnn::checks {

constexpr const char* kNames[] = {"mma_bf16", "mma_f16",  "mma_tf32", "mma_f64",
                                  "matrices", "shuffles", "copies",   "named_barriers"};

// Throws, with a sentence, if the primitives do not do what the loops do.
void run(int check);

}  // namespace frnn::checks
