// SPDX-License-Identifier: Apache-2.0
// Shared memory with its guards, and global memory whose relaxed stores arrive late and reordered.
#include "machine.h"

#if defined(FRNN_SIM_TSAN)
// Orders 0, 2 and 3: relaxed, acquire and release. Atomic, and seen by the sanitizer.
extern "C" {
uint32_t __tsan_atomic32_load(const volatile uint32_t* p, int order);
uint64_t __tsan_atomic64_load(const volatile uint64_t* p, int order);
void __tsan_atomic32_store(volatile uint32_t* p, uint32_t v, int order);
void __tsan_atomic64_store(volatile uint64_t* p, uint64_t v, int order);
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t v, int order);
void __tsan_acquire(void* token);
}
#endif

namespace frnn::sim {
namespace {

#if !defined(FRNN_SIM_TSAN)
uint64_t read_word(const void* p, int bytes) {
  return bytes == 4 ? *static_cast<const volatile uint32_t*>(p)
                    : *static_cast<const volatile uint64_t*>(p);
}
#endif

void write_word(void* p, uint64_t v, int bytes) {
  if (bytes == 4) {
    *static_cast<volatile uint32_t*>(p) = static_cast<uint32_t>(v);
  } else {
    *static_cast<volatile uint64_t*>(p) = v;
  }
}

void check_word(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<size_t>(bytes) != 0) {
    fail("an access of " + number(static_cast<size_t>(bytes)) + " bytes is misaligned");
  }
}

void perform(Block& block, size_t i) {
  const Pending store = block.stores[i];
  block.stores.erase(block.stores.begin() + static_cast<ptrdiff_t>(i));
  write_word(store.to, store.value, store.bytes);
  happened();
}

template <class F>
void perform_where(Block& block, F f) {
  size_t kept = 0;
  for (size_t i = 0; i < block.stores.size(); ++i) {
    const Pending& store = block.stores[i];
    if (f(store)) {
      write_word(store.to, store.value, store.bytes);
      happened();
    } else {
      block.stores[kept++] = store;
    }
  }
  block.stores.resize(kept);
}

unsigned char* begin(const Block& block, const Array& array) { return block.base + array.offset; }

size_t end_of(const Array& array) { return array.offset + array.bytes; }

#if defined(FRNN_SIM_TSAN)
Token& release_fence(Thread& t) {
  Token& token = t.fences[t.fence_count++ % 8];
  token.release();
  return token;
}
#endif

}  // namespace

void copy_bytes(void* to, const void* from, size_t bytes) {
  auto* t = static_cast<volatile unsigned char*>(to);
  auto* f = static_cast<const volatile unsigned char*>(from);
  for (size_t i = 0; i < bytes; ++i) t[i] = f[i];
}

// ---- Shared memory: [guard] dynamic [guard] array [guard] array ...

void make_shared(Block& block) {
  constexpr size_t kMostArrays = 32, kAlign = 128;
  if (grid->arrays.empty()) grid->arrays.push_back({nullptr, "dynamic", 0, grid->how.smem});
  block.memory.assign(
      2 * kAlign + kGuard + grid->how.smem + kStaticLimit + (kMostArrays + 1) * (kGuard + 16),
      kGuardValue);
  auto address = reinterpret_cast<uintptr_t>(block.memory.data()) + kGuard;
  block.base = reinterpret_cast<unsigned char*>((address + kAlign - 1) / kAlign * kAlign);
  for (const Array& a : grid->arrays) std::memset(begin(block, a), kPoison, a.bytes);
  forbid(block.memory.data(), block.memory.size());
  for (const Array& a : grid->arrays) allow(begin(block, a), a.bytes);
}

void end_shared(Block& block) {
  allow(block.memory.data(), block.memory.size());
  const Thread& last = *block.threads[0];
  if (!block.flights.empty()) {
    report(last, "the block exits with " + number(block.flights.size()) +
                     " copies or stores into its shared memory in flight");
  }
  const unsigned char* p = block.memory.data();
  auto check_guard = [&](const unsigned char* end, const char* after) {
    for (; p < end; ++p) {
      if (*p != kGuardValue) {
        report(last, std::string("a write out of bounds of shared memory, before or after '") +
                         after + "'");
      }
    }
  };
  for (const Array& a : grid->arrays) {
    check_guard(begin(block, a), a.name);
    p += a.bytes;
    std::memset(begin(block, a), kPoison, a.bytes);
  }
  check_guard(block.memory.data() + block.memory.size(), grid->arrays.back().name);
}

void* shared_array(const void* tag, const char* name, size_t bytes) {
  Block& block = *grid->running->block;
  for (const Array& a : grid->arrays) {
    if (a.tag == tag) return begin(block, a);
  }
  size_t sum = bytes;
  for (size_t i = 1; i < grid->arrays.size(); ++i) sum += grid->arrays[i].bytes;
  if (sum > kStaticLimit) {
    fail(number(sum) + " bytes of static shared memory, there are " + number(kStaticLimit));
  }
  if (sum + grid->how.smem > kSharedLimit) {
    fail(number(sum + grid->how.smem) + " bytes of shared memory, there are " +
         number(kSharedLimit));
  }
  // 16 bytes beyond a multiple of 128: more alignment than the macro promises is not there.
  const size_t offset = (end_of(grid->arrays.back()) + kGuard + 127) / 128 * 128 + 16;
  const Array array = {tag, name, offset, bytes};
  grid->arrays.push_back(array);
  for (auto& cluster : grid->clusters) {
    for (auto& other : cluster->blocks) {
      if (begin(*other, array) + bytes + kGuard > other->memory.data() + other->memory.size()) {
        fail("too many shared arrays for the simulator");
      }
      allow(begin(*other, array), bytes);
      std::memset(begin(*other, array), kPoison, bytes);
    }
  }
  return begin(block, array);
}

unsigned char* dynamic_shared() { return grid->running->block->base; }

Block* block_of(const Cluster& cluster, const void* p) {
  for (auto& block : cluster.blocks) {
    const auto* q = static_cast<const unsigned char*>(p);
    if (q >= block->memory.data() && q < block->memory.data() + block->memory.size()) {
      return block.get();
    }
  }
  return nullptr;
}

void check_shared(const char* what, const Block& block, const void* p, size_t bytes, size_t align) {
  const auto* q = static_cast<const unsigned char*>(p);
  if (reinterpret_cast<uintptr_t>(q) % align != 0) {
    fail(std::string(what) + " at a shared address that is not a multiple of " + number(align));
  }
  for (const Array& a : grid->arrays) {
    if (q >= begin(block, a) && q + bytes <= begin(block, a) + a.bytes) return;
  }
  fail(std::string(what) + " of " + number(bytes) + " bytes outside every array in shared memory");
}

unsigned char* map_rank(const void* p, int rank) {
  Thread& t = *grid->running;
  if (rank < 0 || rank >= grid->how.cluster) fail("map_rank to a rank that the cluster lacks");
  check_shared("map_rank", *t.block, p, 1, 1);
  const auto offset = static_cast<const unsigned char*>(p) - t.block->base;
  return t.block->cluster->blocks[static_cast<size_t>(rank)]->base + offset;
}

int cluster_rank() { return grid->running->block->rank; }
int cluster_size() { return grid->how.cluster; }

void check_cluster(const char* what, const void* p, size_t bytes) {
  Block* block = block_of(*grid->running->block->cluster, p);
  if (block == nullptr) fail(std::string(what) + " outside the cluster's shared memory");
  if (block->live == 0) fail(std::string(what) + ": the block of that memory has exited");
  check_shared(what, *block, p, bytes, bytes);
}

// ---- Global memory.

void show_to_block(Block& block, const Thread* owner) {
  for (Pending& store : block.stores) {
    if (store.owner == owner) store.shared = true;
  }
}

void drain_for(Thread& t) {
  perform_where(*t.block, [&](const Pending& s) { return s.shared || s.owner == &t; });
}

void drain_all(Block& block) {
  perform_where(block, [](const Pending&) { return true; });
}

bool drain_one(Block& block, bool held) {
  const size_t n = block.stores.size(), from = n == 0 ? 0 : grid->random.below(n);
  for (size_t i = 0; i < n; ++i) {
    const Pending& store = block.stores[(from + i) % n];
    if (store.held && !held) continue;
    size_t first = 0;  // stores to one word stay in order
    while (block.stores[first].to != store.to) ++first;
    perform(block, first);
    return true;
  }
  return false;
}

void before_atomic(const void* p, size_t bytes) {
  check_word(p, static_cast<int>(bytes));
  perform_where(*grid->running->block, [&](const Pending& s) { return s.to == p; });
  happened();
}

uint64_t load_relaxed(const void* p, int bytes, bool acquire) {
  Thread& t = *grid->running;
  check_word(p, bytes);
  if (t.polled == p || grid->random.chance(0.3)) yield();
  t.polled = p;
#if defined(FRNN_SIM_TSAN)
  const int order = acquire ? 2 : 0;
  const uint64_t value =
      bytes == 4 ? __tsan_atomic32_load(static_cast<const volatile uint32_t*>(p), order)
                 : __tsan_atomic64_load(static_cast<const volatile uint64_t*>(p), order);
  if (auto it = grid->released.find(p); it != grid->released.end()) {
    if (acquire) __tsan_acquire(it->second);
    if (!acquire && (t.seen.empty() || t.seen.back() != it->second)) t.seen.push_back(it->second);
  }
  return value;
#else
  (void)acquire;  // loads are never reordered here
  for (size_t i = t.block->stores.size(); i-- > 0;) {
    const Pending& s = t.block->stores[i];
    if (s.to == p && (s.shared || s.owner == &t)) return s.value;
  }
  return read_word(p, bytes);
#endif
}

void store_relaxed(void* p, uint64_t value, int bytes) {
  Thread& t = *grid->running;
  check_word(p, bytes);
  if (grid->random.chance(0.2)) yield();
#if defined(FRNN_SIM_TSAN)
  if (bytes == 4) {
    __tsan_atomic32_store(static_cast<volatile uint32_t*>(p), static_cast<uint32_t>(value), 0);
  } else {
    __tsan_atomic64_store(static_cast<volatile uint64_t*>(p), value, 0);
  }
  if (t.fence_count == 0) {
    grid->released.erase(p);
  } else {
    grid->released[p] = &t.fences[(t.fence_count - 1) % 8];
  }
#else
  t.block->stores.push_back({p, value, bytes, &t, false, comes_late(value)});
#endif
  happened();
}

void store_release(uint32_t* p, uint32_t value) {
  Thread& t = *grid->running;
  check_word(p, 4);
#if defined(FRNN_SIM_TSAN)
  if (grid->random.chance(0.2)) yield();
  __tsan_atomic32_store(p, value, 3);
  grid->released[p] = &release_fence(t);
  happened();
#else
  drain_for(t);
  store_relaxed(p, value, 4);
#endif
}

void red_release_add(uint32_t* p, uint32_t value) {
  Thread& t = *grid->running;
  check_word(p, 4);
  yield();
#if defined(FRNN_SIM_TSAN)
  __tsan_atomic32_fetch_add(p, value, 3);
  grid->released[p] = p;  // holds the releases of all who added
#else
  before_atomic(p, 4);
  drain_for(t);
  write_word(p, static_cast<uint32_t>(read_word(p, 4) + value), 4);
#endif
  (void)t;
  happened();
}

void fence_gpu() {
  Thread& t = *grid->running;
  pause("fence_gpu");
#if defined(FRNN_SIM_TSAN)
  for (void* token : t.seen) __tsan_acquire(token);
  t.seen.clear();
  release_fence(t);
#else
  drain_for(t);
#endif
  yield();
}

}  // namespace frnn::sim
