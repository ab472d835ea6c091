// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#if defined(FRNN_SIM_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
void __tsan_read_range(void* p, unsigned long bytes);
void __tsan_write_range(void* p, unsigned long bytes);
}
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what the ABI makes the callee save, and no signal mask: 10 times faster than swapcontext.
extern "C" void frnn_sim_switch(void** from, void* to);
asm(R"(
.text
.globl frnn_sim_switch
.hidden frnn_sim_switch
.type frnn_sim_switch, @function
frnn_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size frnn_sim_switch, . - frnn_sim_switch
)");
#else
#include <ucontext.h>
#endif

namespace frnn::sim {
namespace {

constexpr uint64_t kUntouched = 0x5157414b43415453;

#if defined(__SANITIZE_ADDRESS__)
Fiber* main_fiber;
#endif

}  // namespace

void fiber_start(Fiber& fiber, unsigned char* stack, size_t bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.bytes = bytes;
  allow(stack, bytes);  // an abandoned fiber left its frames' redzones behind
  *reinterpret_cast<uint64_t*>(stack) = kUntouched;
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(stack + bytes);
  top[-1] = nullptr;  // the return address of entry
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // six registers
  fiber.saved = top - 8;
#else
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack + 16;
  context->uc_stack.ss_size = bytes - 16;
  makecontext(context, entry, 0);
  fiber.saved = context;
#endif
#if defined(FRNN_SIM_TSAN)
  fiber.sanitizer = __tsan_create_fiber(0);
#endif
}

void fiber_adopt(Fiber& fiber) {
#if !defined(__x86_64__)
  fiber.saved = new ucontext_t;
#endif
#if defined(FRNN_SIM_TSAN)
  fiber.sanitizer = __tsan_get_current_fiber();
#elif defined(__SANITIZE_ADDRESS__)
  main_fiber = &fiber;
#else
  (void)fiber;
#endif
}

void fiber_entered() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (main_fiber->stack == nullptr) {  // only the main fiber starts others
    main_fiber->stack = static_cast<unsigned char*>(const_cast<void*>(bottom));
    main_fiber->bytes = bytes;
  }
#endif
}

void fiber_switch(Fiber& from, Fiber& to, bool last) {
  (void)last;
#if defined(FRNN_SIM_TSAN)
  constexpr unsigned kNoSync = 1;
  __tsan_switch_to_fiber(to.sanitizer, kNoSync);
#elif defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer, to.stack, to.bytes);
#endif
#if defined(__x86_64__)
  frnn_sim_switch(&from.saved, to.saved);
#else
  swapcontext(static_cast<ucontext_t*>(from.saved), static_cast<ucontext_t*>(to.saved));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

void fiber_end(Fiber& fiber) {
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(fiber.saved);
#endif
#if defined(FRNN_SIM_TSAN)
  if (fiber.sanitizer != nullptr) __tsan_destroy_fiber(fiber.sanitizer);
#endif
  fiber.sanitizer = nullptr;
  fiber.saved = nullptr;
}

bool fiber_intact(const Fiber& fiber) {
  return *reinterpret_cast<const uint64_t*>(fiber.stack) == kUntouched;
}

#if defined(FRNN_SIM_TSAN)
void Token::release() { __tsan_release(this); }
void Token::acquire() { __tsan_acquire(this); }
void touch_read(const void* p, size_t bytes) { __tsan_read_range(const_cast<void*>(p), bytes); }
void touch_write(void* p, size_t bytes) { __tsan_write_range(p, bytes); }
#else
void Token::release() {}
void Token::acquire() {}
void touch_read(const void*, size_t) {}
void touch_write(void*, size_t) {}
#endif

#if defined(__SANITIZE_ADDRESS__)
void forbid(void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
void allow(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
void forbid(void*, size_t) {}
void allow(void*, size_t) {}
#endif

}  // namespace frnn::sim

#if defined(FRNN_SIM_TSAN)
// See machine.h; blocks that one fiber allocates and another frees would be races too.
extern "C" {
void* __libc_malloc(size_t bytes);
void __libc_free(void* p);
__attribute__((optimize("no-tree-loop-distribute-patterns"))) void* frnn_sim_memmove(
    void* to, const void* from, size_t bytes) {
  auto* t = static_cast<unsigned char*>(to);
  auto* f = static_cast<const unsigned char*>(from);
  if (t <= f) {
    for (size_t i = 0; i < bytes; ++i) t[i] = f[i];
  } else {
    for (size_t i = bytes; i-- > 0;) t[i] = f[i];
  }
  return to;
}
void* frnn_sim_memcpy(void* to, const void* from, size_t bytes) {
  return frnn_sim_memmove(to, from, bytes);
}
__attribute__((optimize("no-tree-loop-distribute-patterns"))) void* frnn_sim_memset(void* to, int v,
                                                                                    size_t bytes) {
  auto* t = static_cast<unsigned char*>(to);
  for (size_t i = 0; i < bytes; ++i) t[i] = static_cast<unsigned char>(v);
  return to;
}
}
void* operator new(size_t bytes) { return __libc_malloc(bytes == 0 ? 1 : bytes); }
void operator delete(void* p) noexcept { __libc_free(p); }
void operator delete(void* p, size_t) noexcept { __libc_free(p); }
#endif
