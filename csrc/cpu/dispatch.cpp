// SPDX-License-Identifier: Apache-2.0
// The choice of the engine for this machine.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/engine.h"

namespace frnn::cpu {
namespace {

// Slowest first. __builtin_cpu_supports also asks the operating system for the registers.
std::vector<const Engine*> usable_engines() {
  std::vector<const Engine*> engines{&kBaseEngine};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    engines.push_back(&kAvx2Engine);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      engines.push_back(&kAvx512Engine);
    }
  }
#endif
  return engines;
}

const std::vector<const Engine*>& engines() {
  static const std::vector<const Engine*> usable = usable_engines();
  return usable;
}

std::atomic<const Engine*>& engine() {
  static std::atomic<const Engine*> chosen{engines().back()};
  return chosen;
}

}  // namespace

const char* isa() { return engine().load()->name; }

const char* isas() {
  static const std::string names = [] {
    std::string list;
    for (const Engine* e : engines()) {
      if (!list.empty()) list += ' ';
      list += e->name;
    }
    return list;
  }();
  return names.c_str();
}

bool set_isa(const char* name) {
  for (const Engine* e : engines()) {
    if (std::strcmp(e->name, name) == 0) {
      engine().store(e);
      return true;
    }
  }
  return false;
}

void forward(int cell, const ForwardArgs<float>& args, const Pool& pool) {
  engine().load()->forward_f32(cell, args, pool);
}
void forward(int cell, const ForwardArgs<double>& args, const Pool& pool) {
  engine().load()->forward_f64(cell, args, pool);
}
void backward(int cell, const BackwardArgs<float>& args, const Pool& pool) {
  engine().load()->backward_f32(cell, args, pool);
}
void backward(int cell, const BackwardArgs<double>& args, const Pool& pool) {
  engine().load()->backward_f64(cell, args, pool);
}

}  // namespace frnn::cpu
