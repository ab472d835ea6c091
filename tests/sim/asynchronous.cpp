// SPDX-License-Identifier: Apache-2.0
// Copies and stores that land some time later, and the mbarriers that count them.
#include <algorithm>

#include "machine.h"

namespace frnn::sim {
namespace {

void complete_if_due(Mbarrier& m) {
  if (m.pending != 0 || m.bytes != 0) return;
  m.pending = m.expected;
  ++m.phase;
  wake_all(m.waiting);
}

// Null, and a report, if there is none.
Mbarrier* find(const Thread& by, Block& block, uint64_t* p) {
  auto it = block.mbarriers.find(p);
  if (it != block.mbarriers.end()) return &it->second;
  report(by, "an mbarrier is used that was not initialised");
  return nullptr;
}

Mbarrier& own(uint64_t* p) {
  Thread& t = *grid->running;
  check_shared("an mbarrier", *t.block, p, 8, 8);
  touch_read(p, 8);
  Mbarrier* m = find(t, *t.block, p);
  if (m == nullptr) fail("");
  return *m;
}

// An mbarrier that the asynchronous proxy or another block uses, with the block it is in.
std::pair<Block*, Mbarrier*> foreign(const char* what, void* p) {
  Thread& t = *grid->running;
  check_cluster(what, p, 8);
  touch_read(p, 8);
  Block* block = block_of(*t.block->cluster, p);
  Mbarrier* m = find(t, *block, static_cast<uint64_t*>(p));
  if (m == nullptr) fail("");
  if (!m->fenced) fail(std::string(what) + ": fence_mbarrier_init is missing");
  return {block, m};
}

void land(Block& block, size_t i) {
  const Flight f = block.flights[i];
  block.flights.erase(block.flights.begin() + static_cast<ptrdiff_t>(i));
  copy_bytes(f.to, f.from != nullptr ? f.from : f.value, static_cast<size_t>(f.bytes));
  std::memset(f.to + f.bytes, 0, static_cast<size_t>(f.filled));
  happened();
  if (f.barrier == nullptr) return;
  Mbarrier* m = find(*f.owner, block, f.barrier);
  if (m == nullptr) return;
  m->bytes -= f.bytes;
  if (m->bytes < -0xfffff) report(*f.owner, "more than 2^20 - 1 bytes in one phase");
  complete_if_due(*m);
}

}  // namespace

bool land_one(Block& block, bool any) {
  if (block.flights.empty()) return false;
#if defined(FRNN_SIM_TSAN)
  any = false;  // the issuer makes its copies at its wait, where the sanitizer is told of them
#endif
  const size_t from = grid->random.below(block.flights.size());
  for (size_t i = 0; i < block.flights.size(); ++i) {
    const size_t j = (from + i) % block.flights.size();
    if (!any && block.flights[j].barrier == nullptr) continue;
    land(block, j);
    return true;
  }
  return false;
}

void end_thread_flights(Thread& t) {
  if (t.last_copy >= t.waited) fail("the thread exits with cp_async copies in flight");
}

void cp_async(void* shared, const void* global, int size, int bytes) {
  Thread& t = *grid->running;
  const auto n = static_cast<size_t>(size);
  check_shared("cp_async", *t.block, shared, n, n);
  if (reinterpret_cast<uintptr_t>(global) % n != 0) fail("cp_async from a misaligned address");
  if (bytes < 0 || bytes > size) fail("cp_async that reads more than it copies");
  touch_read(global, static_cast<size_t>(bytes));
  touch_write(shared, n);
  t.block->flights.push_back({static_cast<unsigned char*>(shared),
                              static_cast<const unsigned char*>(global),
                              {},
                              bytes,
                              size - bytes,
                              nullptr,
                              &t,
                              t.group});
  t.last_copy = t.group;
  if (grid->random.chance(0.1)) yield();
}

void cp_async_commit() { ++grid->running->group; }

void cp_async_wait(int pending) {
  Thread& t = *grid->running;
  t.waited = std::max(t.waited, t.group - pending);
  auto& flights = t.block->flights;
  for (size_t i = 0; i < flights.size();) {
    const Flight& f = flights[i];
    if (f.owner == &t && f.barrier == nullptr && f.group < t.waited) {
      touch_read(f.from, static_cast<size_t>(f.bytes));
      touch_write(f.to, static_cast<size_t>(f.bytes + f.filled));
      land(*t.block, i);
    } else {
      ++i;
    }
  }
  if (grid->random.chance(0.5)) yield();
}

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  Thread& t = *grid->running;
  check_shared("bulk_copy", *t.block, shared, bytes, 16);
  if (bytes % 16 != 0) fail("bulk_copy of a size that is not a multiple of 16");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("bulk_copy from a misaligned address");
  auto [block, m] = foreign("bulk_copy", barrier);
  touch_read(global, bytes);
  touch_write(shared, bytes);
  m->token.release();
  block->flights.push_back({static_cast<unsigned char*>(shared),
                            static_cast<const unsigned char*>(global),
                            {},
                            static_cast<int>(bytes),
                            0,
                            barrier,
                            &t,
                            0});
  yield();
}

void store_async(void* p, const void* value, int bytes, void* barrier) {
  Thread& t = *grid->running;
  const auto n = static_cast<size_t>(bytes);
  check_cluster("store_async", p, n);
  auto [block, m] = foreign("store_async", barrier);
  if (block_of(*t.block->cluster, p) != block) {
    fail("store_async with an mbarrier of another block than the address");
  }
  touch_write(p, n);
  m->token.release();
  Flight f = {static_cast<unsigned char*>(p),  nullptr, {}, bytes, 0,
              static_cast<uint64_t*>(barrier), &t,      0};
  copy_bytes(f.value, value, n);
  block->flights.push_back(f);
  if (grid->random.chance(0.2)) yield();
}

void mbarrier_init(uint64_t* p, int arrivals) {
  Thread& t = *grid->running;
  check_shared("mbarrier_init", *t.block, p, 8, 8);
  touch_write(p, 8);
  if (arrivals < 1) fail("mbarrier_init for less than one arrival");
  Mbarrier m;
  m.expected = m.pending = arrivals;
  m.initialiser = &t;
  if (!t.block->mbarriers.emplace(p, std::move(m)).second) fail("mbarrier_init for a second time");
}

void fence_mbarrier_init() {
  Thread& t = *grid->running;
  for (auto& [p, m] : t.block->mbarriers) m.fenced |= m.initialiser == &t;
}

void mbarrier_expect(uint64_t* p, uint32_t bytes) {
  Mbarrier& m = own(p);
  m.bytes += bytes;
  if (m.bytes > 0xfffff) fail("more than 2^20 - 1 bytes in one phase of an mbarrier");
  complete_if_due(m);
}

void mbarrier_arrive(void* p, bool remote) {
  Thread& t = *grid->running;
  Mbarrier& m =
      remote ? *foreign("mbarrier_arrive_remote", p).second : own(static_cast<uint64_t*>(p));
  if (m.pending == 0) fail("more arrivals at an mbarrier than its phase expects");
  if (remote) {
    drain_for(t);
  } else {
    show_to_block(*t.block, &t);
  }
  m.token.release();
  --m.pending;
  happened();
  complete_if_due(m);
  if (grid->random.chance(0.3)) yield();
}

bool mbarrier_test(uint64_t* p, uint32_t parity) {
  Mbarrier& m = own(p);
  if (parity > 1) fail("an mbarrier's parity is 0 or 1");
  yield();
  if ((m.phase & 1) == parity) return false;
  m.token.acquire();
  return true;
}

void mbarrier_wait(uint64_t* p, uint32_t parity) {
  Thread& t = *grid->running;
  Mbarrier& m = own(p);
  if (parity > 1) fail("an mbarrier's parity is 0 or 1");
  while ((m.phase & 1) == parity) {
    m.waiting.push_back(&t);
    wait(Wait::kMbarrier, "mbarrier_wait");
  }
  m.token.acquire();
  if (grid->random.chance(0.3)) yield();
}

}  // namespace frnn::sim
