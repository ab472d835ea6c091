// SPDX-License-Identifier: Apache-2.0
// The state of the launch that runs: threads, warps, blocks, and what is under way between them.
#pragma once

#include <cstddef>

#if defined(FRNN_SIM_TSAN)
// The simulator's own bookkeeping must not look like accesses of the running fiber, and the
// sanitizer sees these functions even in code that is not instrumented.
extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("frnn_sim_memcpy");
void* memmove(void*, const void*, size_t) noexcept __asm__("frnn_sim_memmove");
void* memset(void*, int, size_t) noexcept __asm__("frnn_sim_memset");
}
#endif

#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/primitives.h"
#include "fiber.h"
#include "sim.h"

namespace frnn::sim {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return (next() >> 32) * n >> 32; }
  bool chance(double p) { return (next() >> 11) * 0x1p-53 < p; }

 private:
  uint64_t state_;
};

struct Block;
struct Warp;

enum class Wait { kNone, kMeeting, kCollective, kMbarrier, kDependency, kPause, kDone };

struct Thread {
  Fiber fiber;
  Block* block;
  Warp* warp;
  uint3 index;
  int lane;
  Wait wait = Wait::kNone;
  const char* waits_at = "";
  size_t position = 0;  // in Grid::ready
  int group = 0;        // of cp_async that is being filled
  int last_copy = -1;   // the group of the latest copy
  int waited = 0;       // groups before this one have been waited for
  unsigned cluster_phase = 0;
  bool cluster_arrived = false;
  const void* polled = nullptr;  // where it loaded last
  // ThreadSanitizer: what its fences released, and what its next fence acquires.
  Token fences[8];
  unsigned fence_count = 0;
  std::vector<void*> seen;
};

// Lanes that wait for the rest of their mask.
struct Collective {
  const char* what;
  uint32_t mask, arrived;
  Token* token;
  void* arguments[32];
};

struct Warp {
  Thread* lanes[32] = {};
  uint32_t live = 0;
  bool starved = false;
  std::vector<Collective> open;
  unsigned opened = 0;
  Token tokens[8];
};

// The token alternates with the phase: nobody can be two phases ahead of a thread that still waits.
struct Meeting {
  int threads = 0, arrived = 0;
  unsigned phase = 0;
  std::vector<Thread*> waiting;
  Token tokens[2];
};

struct Mbarrier {
  int expected, pending;
  int64_t bytes = 0;
  unsigned phase = 0;
  bool fenced = false;
  Thread* initialiser;
  std::vector<Thread*> waiting;
  Token token;
};

// A copy or store on its way to shared memory.
struct Flight {
  unsigned char* to;
  const unsigned char* from;  // null: value
  unsigned char value[16];
  int bytes, filled;  // read; then zeros
  uint64_t* barrier;  // or null: cp_async
  Thread* owner;
  int group;
};

// A store to global memory that only some threads see.
struct Pending {
  void* to;
  uint64_t value;
  int bytes;
  Thread* owner;
  bool shared;  // a barrier has shown it to the block: whoever releases, releases it too
  bool held;    // stays until something forces it out
};

struct Cluster;
struct Block {
  uint3 index;
  Cluster* cluster;
  int rank;
  int live = 0;
  bool lets_next_start = false;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<unsigned char> memory;
  unsigned char* base;  // of the dynamic part, 128-byte aligned
  Meeting barriers[16];
  std::unordered_map<uint64_t*, Mbarrier> mbarriers;
  std::vector<Flight> flights;
  std::vector<Pending> stores;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int live = 0, arrived = 0;
  unsigned phase = 0;
  std::vector<Thread*> waiting;
  Token tokens[2];
};

struct Array {
  const void* tag;
  const char* name;
  size_t offset, bytes;  // from Block::base
};

// How a seed schedules.
struct Mode {
  enum Order { kUniform, kNewest, kRuns, kInOrder, kStarvedWarps, kStarvedBlocks } order;
  double land, drain, hold;  // chance per tick, per tick, per store
  size_t resident;           // clusters of a grid that is not cooperative
};

struct Grid {
  const char* kernel;
  cuda::Launch how;
  std::function<void()> body;
  Random random;
  Mode mode;
  std::vector<unsigned> order;   // the first block of each cluster, as they start
  size_t started = 0, resident;  // clusters
  Grid* ahead = nullptr;         // the launch before, if this one may start before that ends
  double eager = 0;              // chance per tick to run rather than a grid ahead
  size_t held_back;              // blocks that do not let the next grid start yet
  std::vector<Thread*> dependents, paused;
  Fiber scheduler;
  Thread* running = nullptr;
  std::vector<Thread*> ready;
  std::vector<std::unique_ptr<Cluster>> clusters;  // resident
  std::vector<std::unique_ptr<Cluster>> ended;     // ThreadSanitizer: kept, as a free is a write
  std::vector<Array> arrays;                       // of every block; the dynamic one first
  std::string error;
  uint64_t tick = 0, quiet = 0;  // switches, and those since anything happened
  uint64_t starve_until = 0;
  Token end;
  std::unordered_map<const void*, void*> released;  // ThreadSanitizer: what to acquire, by word

  Grid(const char* name, const cuda::Launch& launch, const std::function<void()>& f, uint64_t seed)
      : kernel(name), how(launch), body(f), random(seed) {}
  bool done() const { return started == order.size() && clusters.empty(); }
  int block_threads() const { return static_cast<int>(how.block.x * how.block.y * how.block.z); }
};

extern Grid* grid;

constexpr size_t kGuard = 128;  // bytes between arrays, of this value
constexpr unsigned char kGuardValue = 0xfb;
constexpr unsigned char kPoison = 0xff;  // NaN in every format
constexpr size_t kStaticLimit = 48 * 1024, kSharedLimit = 227 * 1024;

// ---- Scheduling.
[[noreturn]] void fail(const std::string& sentence);  // by the running thread
void report(const Thread& thread, const std::string& sentence);
std::string number(uint64_t n);
void wait(Wait how, const char* what);  // until wake
void wake(Thread* thread);
void wake_all(std::vector<Thread*>& threads);
void happened();                // this launch made progress
void pause(const char* where);  // if the script says so
bool comes_late(uint64_t value);

// ---- Memory.
void make_shared(Block& block);
void end_shared(Block& block);
void check_shared(const char* what, const Block& block, const void* p, size_t bytes, size_t align);
Block* block_of(const Cluster& cluster, const void* p);
void show_to_block(Block& block, const Thread* owner);  // null: of every thread
void drain_for(Thread& thread);  // what a release by this thread must show first
bool drain_one(Block& block, bool held);
void drain_all(Block& block);
bool land_one(Block& block, bool any);
void end_thread_flights(Thread& thread);
void end_warp(Thread& thread);
void end_cluster_thread(Thread& thread);
void copy_bytes(void* to, const void* from, size_t bytes);

}  // namespace frnn::sim
