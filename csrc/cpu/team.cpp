// SPDX-License-Identifier: Apache-2.0
#include "cpu/team.h"

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace frnn::cpu {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// How this thread calculates, and the bits of that by which it neither makes nor reads subnormal
// numbers.
#if defined(__x86_64__)
constexpr uint64_t kFlush = 0x8040;
uint64_t mode() { return _mm_getcsr(); }
void set_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlush = 1 << 24;
uint64_t mode() {
  uint64_t mode;
  __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_mode(uint64_t mode) { __asm__ __volatile__("msr fpcr, %0" : : "r"(mode)); }
#else
constexpr uint64_t kFlush = 0;
uint64_t mode() { return 0; }
void set_mode(uint64_t) {}
#endif

// About 3 us: longer than slices differ when each has its core, far shorter than a time slice.
constexpr int kSpins = 150;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Buffer {
  std::unique_ptr<void, Free> memory;
  size_t bytes = 0;
};

}  // namespace

void Barrier::arrive_and_wait(int slices) {
  const unsigned generation = generation_.load(std::memory_order_relaxed);
  if (missing_.fetch_sub(slices, std::memory_order_acq_rel) == slices) {
    missing_.store(slices_, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; generation_.load(std::memory_order_acquire) == generation; ++spin) {
    if (spin < kSpins) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

FlushToZero::FlushToZero() : mode_(mode()) { set_mode(mode_ | kFlush); }
FlushToZero::~FlushToZero() { set_mode(mode_); }

void* workspace(size_t bytes) {
  constexpr size_t kAlignment = 128;
  thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    buffer = {};
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    buffer.memory.reset(std::aligned_alloc(kAlignment, rounded));
    if (!buffer.memory) throw std::bad_alloc();
    buffer.bytes = rounded;
    prefer_huge_pages(buffer.memory.get(), rounded);
  }
  return buffer.memory.get();
}

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace frnn::cpu
