// SPDX-License-Identifier: Apache-2.0
// The choice of the engine for this machine.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/engine.h"

#if defined(FRNN_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace frnn::cpu {
namespace {

#if defined(FRNN_AMX)
// Whether the processor has tiles of bfloat16 and the kernel lets this process use them.
bool tiles_granted() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // in edx of leaf 7
  constexpr long kRequestPermission = 0x1023, kTileData = 18;   // of arch_prctl
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Slowest first. __builtin_cpu_supports also asks the operating system for the registers.
std::vector<const Engine*> usable_engines() {
  std::vector<const Engine*> engines{&kBaseEngine};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    engines.push_back(&kAvx2Engine);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      engines.push_back(&kAvx512Engine);
#if defined(FRNN_AMX)
      if (__builtin_cpu_supports("avx512bf16") && tiles_granted()) engines.push_back(&kAmxEngine);
#endif
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
bool update(int cell, bool backward, const UpdateArgs<float>& args, const Pool& pool) {
  return engine().load()->update_f32(cell, backward, args, pool);
}
bool update(int cell, bool backward, const UpdateArgs<double>& args, const Pool& pool) {
  return engine().load()->update_f64(cell, backward, args, pool);
}
void mask(const MaskArgs<float>& args, const Pool& pool) { engine().load()->mask_f32(args, pool); }
void mask(const MaskArgs<double>& args, const Pool& pool) { engine().load()->mask_f64(args, pool); }
void mask(const MaskArgs<uint8_t>& args, const Pool& pool) { engine().load()->mask_u8(args, pool); }

}  // namespace frnn::cpu
