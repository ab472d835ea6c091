// SPDX-License-Identifier: Apache-2.0
// A stack of its own that runs until it switches away: one CUDA thread of the simulator.
#pragma once

#include <cstddef>
#include <cstdint>

namespace frnn::sim {

struct Fiber {
  void* saved = nullptr;           // the stack pointer while another fiber runs
  unsigned char* stack = nullptr;  // lowest address
  size_t bytes = 0;
  void* sanitizer = nullptr;  // TSan's fiber, ASan's fake stack
};

// Prepares `fiber` to run entry(), which must never return.
void fiber_start(Fiber& fiber, unsigned char* stack, size_t bytes, void (*entry)());

// The first thing entry() calls.
void fiber_entered();

// Runs `to` until it switches back; `last` if `from` never runs again.
void fiber_switch(Fiber& from, Fiber& to, bool last = false);

// `fiber` runs no more.
void fiber_end(Fiber& fiber);

// The fiber of the OS thread that calls.
void fiber_adopt(Fiber& fiber);

// Whether the stack is untouched at its lowest words.
bool fiber_intact(const Fiber& fiber);

// Orders what one fiber did before `release` before what another does after `acquire` of the same
// token. Only ThreadSanitizer sees it.
struct Token {
  uint64_t value = 0;
  void release();
  void acquire();
};
// Tells the sanitizer of an access that the simulator makes on behalf of the running fiber.
void touch_read(const void* p, size_t bytes);
void touch_write(void* p, size_t bytes);

// Marks bytes between arrays for ASan.
void forbid(void* p, size_t bytes);
void allow(void* p, size_t bytes);

}  // namespace frnn::sim
