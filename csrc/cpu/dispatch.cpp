// SPDX-License-Identifier: Apache-2.0
// The choice of the engine for this machine.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/engine.h"
#include "cpu/plan.h"

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

// What runs: an engine, and engines on tiles if there are any.
struct Choice {
  const char* name;
  const Engine* engine;
  const TileEngine<BFloat16>* bfloat16 = nullptr;
  const TileEngine<float>* float32 = nullptr;
};

// Slowest first. __builtin_cpu_supports also asks the operating system for the registers.
std::vector<Choice> usable() {
  std::vector<Choice> choices{{kBaseEngine.name, &kBaseEngine}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    choices.push_back({kAvx2Engine.name, &kAvx2Engine});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      choices.push_back({kAvx512Engine.name, &kAvx512Engine});
#if defined(FRNN_AMX)
      if (__builtin_cpu_supports("avx512bf16") && tiles_granted()) {
        choices.push_back({"amx", &kAvx512Engine, &kAmxBFloat16, &kAmxFloat});
      }
#endif
    }
  }
#endif
  return choices;
}

const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = usable();
  return all;
}

std::atomic<const Choice*>& chosen() {
  static std::atomic<const Choice*> choice{&choices().back()};
  return choice;
}

const Engine* engine() { return chosen().load()->engine; }

// The tiles for a sequence of values stored in float, or null.
const TileEngine<float>* tiles_for(int cell, int64_t steps, int64_t rows) {
  return tiles_pay(steps, rows) && cell_facts(cell).late == 0 ? chosen().load()->float32 : nullptr;
}

}  // namespace

const char* isa() { return chosen().load()->name; }

const char* isas() {
  static const std::string names = [] {
    std::string list;
    for (const Choice& choice : choices()) {
      if (!list.empty()) list += ' ';
      list += choice.name;
    }
    return list;
  }();
  return names.c_str();
}

bool set_isa(const char* name) {
  for (const Choice& choice : choices()) {
    if (std::strcmp(choice.name, name) == 0) {
      chosen().store(&choice);
      return true;
    }
  }
  return false;
}

void forward(int cell, const ForwardArgs<float>& args, const Pool& pool) {
  const auto* tiles = tiles_for(cell, args.t, args.b);
  (tiles ? tiles->forward : engine()->forward_f32)(cell, args, pool);
}
void forward(int cell, const ForwardArgs<double>& args, const Pool& pool) {
  engine()->forward_f64(cell, args, pool);
}
void forward(int cell, const ForwardArgs<BFloat16>& args, const Pool& pool) {
  chosen().load()->bfloat16->forward(cell, args, pool);
}
void backward(int cell, const BackwardArgs<float>& args, const Pool& pool) {
  const auto* tiles = tiles_for(cell, args.t, args.b);
  (tiles ? tiles->backward : engine()->backward_f32)(cell, args, pool);
}
void backward(int cell, const BackwardArgs<double>& args, const Pool& pool) {
  engine()->backward_f64(cell, args, pool);
}
void backward(int cell, const BackwardArgs<BFloat16>& args, const Pool& pool) {
  chosen().load()->bfloat16->backward(cell, args, pool);
}
bool stores_bfloat16(int cell) {
  return chosen().load()->bfloat16 != nullptr && cell_facts(cell).late == 0;
}
bool update(int cell, bool backward, const UpdateArgs<float>& args, const Pool& pool) {
  return engine()->update_f32(cell, backward, args, pool);
}
bool update(int cell, bool backward, const UpdateArgs<double>& args, const Pool& pool) {
  return engine()->update_f64(cell, backward, args, pool);
}
void mask(const MaskArgs<float>& args, const Pool& pool) { engine()->mask_f32(args, pool); }
void mask(const MaskArgs<double>& args, const Pool& pool) { engine()->mask_f64(args, pool); }
void mask(const MaskArgs<uint8_t>& args, const Pool& pool) { engine()->mask_u8(args, pool); }

}  // namespace frnn::cpu
