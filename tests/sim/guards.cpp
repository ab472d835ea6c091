// SPDX-License-Identifier: Apache-2.0
#include "guards.h"

#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <stdexcept>

#include "machine.h"

namespace frnn::sim {
namespace {

const Guards* guards = nullptr;
struct sigaction before;

void on_fault(int, siginfo_t* info, void*) {
  if (guards == nullptr || !guards->report(info->si_addr)) sigaction(SIGSEGV, &before, nullptr);
}

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

Guards::Guards() {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler switches away and never returns
  sigaction(SIGSEGV, &action, &before);
  guards = this;
}

Guards::~Guards() {
  guards = nullptr;
  sigaction(SIGSEGV, &before, nullptr);
  for (const Guarded& g : arrays_) munmap(g.pages, g.mapped);
}

void* Guards::add(const std::string& name, void* array, size_t bytes) {
  for (const Guarded& g : arrays_) {
    if (g.original == array) return g.copy();
  }
  const size_t mapped = (bytes + page() - 1) / page() * page() + 2 * page();
  void* pages = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  arrays_.push_back({name, array, bytes, static_cast<unsigned char*>(pages), mapped});
  const Guarded& g = arrays_.back();
  std::memset(g.pages, kPoison, mapped);
  std::memcpy(g.copy(), array, bytes);
  mprotect(g.pages, page(), PROT_NONE);
  mprotect(g.pages + mapped - page(), page(), PROT_NONE);
  return g.copy();
}

void Guards::copy_back() const {
  for (const Guarded& g : arrays_) {
    for (const unsigned char* p = g.pages + page(); p < g.copy(); ++p) {
      if (*p != kPoison) throw std::runtime_error("a write before the beginning of " + g.name);
    }
    std::memcpy(g.original, g.copy(), g.bytes);
  }
}

bool Guards::report(const void* address) const {
  const auto* p = static_cast<const unsigned char*>(address);
  for (const Guarded& g : arrays_) {
    if (p >= g.pages && p < g.pages + page()) fail("an access before the beginning of " + g.name);
    if (p >= g.pages + g.mapped - page() && p < g.pages + g.mapped) {
      fail("an access beyond the end of " + g.name);
    }
  }
  return false;
}

unsigned char* Guards::Guarded::copy() const { return pages + mapped - page() - bytes; }

}  // namespace frnn::sim
