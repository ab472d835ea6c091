// SPDX-License-Identifier: Apache-2.0
// The bounds of arrays in global memory.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace frnn::sim {

// Copies of arrays that end at a page which nobody may touch, and begin behind one with what is
// left of a page between: while this lives, an access beyond them is an error of the launch.
class Guards {
 public:
  Guards();
  ~Guards();
  void* add(const std::string& name, void* array, size_t bytes);  // the copy
  void copy_back() const;  // throws, with a sentence, after a write before the beginning of one
  // By the thread whose access failed; false if it has to do with no guard.
  bool report(const void* address) const;

 private:
  struct Guarded {
    std::string name;
    void* original;
    size_t bytes;
    unsigned char* pages;
    size_t mapped;
    unsigned char* copy() const;
  };
  std::vector<Guarded> arrays_;
};

}  // namespace frnn::sim
