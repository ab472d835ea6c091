// SPDX-License-Identifier: Apache-2.0
// toys TOY BUG FIRST_SEED SEEDS: runs a toy under a sanitizer, which ends the program at its first
// find. Prints how many runs failed by themselves.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "sim.h"
#include "toys.h"

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  int failed = 0;
  for (int i = 0; i < std::atoi(argv[4]); ++i) {
    frnn::sim::set_seed(static_cast<uint64_t>(std::atoi(argv[3]) + i));
    try {
      frnn::toys::run_toy(static_cast<frnn::toys::Toy>(std::atoi(argv[1])),
                          static_cast<frnn::toys::Bug>(std::atoi(argv[2])));
    } catch (const std::runtime_error& error) {
      if (failed++ == 0) std::puts(error.what());
    }
  }
  std::printf("%d failed\n", failed);
}
