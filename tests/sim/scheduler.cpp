// SPDX-License-Identifier: Apache-2.0
// Chooses which thread runs, when delayed memory operations take effect, and notices when nothing
// can go on.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

namespace frnn::sim {

Grid* grid = nullptr;

namespace {

uint64_t next_seed = 0;
struct {
  std::string pause;
  int block, warp = -1;
  int64_t late = -1;
} script;
std::vector<std::string> names;  // of the kernels launched

using Launches = std::vector<std::unique_ptr<Grid>>;
Launches* queue = nullptr;  // of `overlapping`, while it runs its host code

#if defined(FRNN_SIM_TSAN) || defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
#if defined(FRNN_SIM_TSAN)
constexpr size_t kMostThreads = 8000;  // TSan of GCC 12 has 8128 fibers
constexpr bool kReuseStacks = false;   // a stack's next user would seem to race with its last
#else
constexpr size_t kMostThreads = 1 << 20;
constexpr bool kReuseStacks = true;
#endif

// Address space for stacks; only pages that were used take memory.
class Stacks {
 public:
  unsigned char* take() {
    if (free_.empty()) {
      constexpr size_t kAtOnce = 64;
      void* p = mmap(nullptr, kAtOnce * kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      for (size_t i = 0; i < kAtOnce; ++i) {
        free_.push_back(static_cast<unsigned char*>(p) + i * kStackBytes);
      }
    }
    unsigned char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(unsigned char* stack) { (kReuseStacks ? free_ : used_).push_back(stack); }
  void launch_ended() {
    free_.insert(free_.end(), used_.begin(), used_.end());
    used_.clear();
  }

 private:
  std::vector<unsigned char*> free_, used_;
};
Stacks stacks;

std::string place(uint3 i) {
  return "(" + number(i.x) + ", " + number(i.y) + ", " + number(i.z) + ")";
}

std::string name(const Thread& t) {
  return "block " + place(t.block->index) + ", thread " + place(t.index);
}

Mode choose_mode(Random& random) {
  constexpr double kLand[] = {0, 0.001, 0.02, 0.3};
  constexpr double kDrain[] = {0.001, 0.02, 0.2, 0.9};
  constexpr double kHold[] = {0, 0.02, 0.3};
  return {static_cast<Mode::Order>(random.below(6)), kLand[random.below(4)],
          kDrain[random.below(4)], kHold[random.below(3)], 1 + random.below(4)};
}

void thread_main() {
  fiber_entered();
  Thread& t = *grid->running;
  grid->body();
  if (!fiber_intact(t.fiber)) fail("the stack overflowed");
  end_thread_flights(t);
  end_warp(t);
  t.wait = Wait::kDone;
  grid->end.release();
  fiber_switch(t.fiber, grid->scheduler, true);
  __builtin_trap();
}

void start_cluster(unsigned first) {
  const dim3 n = grid->how.grid, threads = grid->how.block;
  auto cluster = std::make_unique<Cluster>();
  for (int rank = 0; rank < grid->how.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    const unsigned i = first + static_cast<unsigned>(rank);
    block->index = {i % n.x, i / n.x % n.y, i / n.x / n.y};
    block->cluster = cluster.get();
    block->rank = rank;
    make_shared(*block);
    for (int j = 0; j < grid->block_threads(); ++j) {
      if (j % 32 == 0) block->warps.push_back(std::make_unique<Warp>());
      const unsigned u = static_cast<unsigned>(j);
      auto t = std::make_unique<Thread>();
      t->block = block.get();
      t->warp = block->warps.back().get();
      t->index = {u % threads.x, u / threads.x % threads.y, u / threads.x / threads.y};
      t->lane = j % 32;
      t->warp->lanes[t->lane] = t.get();
      t->warp->live |= 1u << t->lane;
      fiber_start(t->fiber, stacks.take(), kStackBytes, thread_main);
      wake(t.get());
      block->threads.push_back(std::move(t));
    }
    block->live = grid->block_threads();
    cluster->live += block->live;
    cluster->blocks.push_back(std::move(block));
  }
  grid->clusters.push_back(std::move(cluster));
}

void end_cluster(Cluster& cluster) {
  for (auto& block : cluster.blocks) drain_all(*block);
  for (auto& block : cluster.blocks) {
    for (auto& t : block->threads) {
      stacks.give(t->fiber.stack);
      fiber_end(t->fiber);
    }
    allow(block->memory.data(), block->memory.size());
  }
  auto it = std::find_if(grid->clusters.begin(), grid->clusters.end(),
                         [&](auto& c) { return c.get() == &cluster; });
  if (!kReuseStacks) grid->ended.push_back(std::move(*it));
  grid->clusters.erase(it);
}

// Another set of warps or blocks falls behind, or all but one do.
void starve() {
  Random& random = grid->random;
  constexpr uint64_t kLongest[] = {100, 1000, 10000};
  grid->starve_until = grid->tick + 1 + random.below(kLongest[random.below(3)]);
  constexpr double kShare[] = {0.1, 0.5, 0.9};
  const double share = kShare[random.below(3)];
  for (auto& cluster : grid->clusters) {
    for (auto& block : cluster->blocks) {
      const bool all = random.chance(share);
      const bool by_block = grid->mode.order == Mode::kStarvedBlocks;
      for (auto& warp : block->warps) warp->starved = by_block ? all : random.chance(share);
    }
  }
}

Thread* choose() {
  auto& ready = grid->ready;
  Random& random = grid->random;
  switch (grid->mode.order) {
    case Mode::kNewest:
      // Now and then another, or a thread that polls would run for ever.
      return random.chance(0.9) ? ready.back() : ready[random.below(ready.size())];
    case Mode::kRuns:
      if (grid->running != nullptr && grid->running->wait == Wait::kNone && random.chance(0.95)) {
        return grid->running;
      }
      break;
    case Mode::kInOrder:
      return ready[grid->tick % ready.size()];
    case Mode::kStarvedWarps:
    case Mode::kStarvedBlocks: {
      if (grid->tick >= grid->starve_until) starve();
      const size_t from = random.below(ready.size()), most = std::min<size_t>(ready.size(), 256);
      for (size_t i = 0; i < most; ++i) {
        Thread* t = ready[(from + i) % ready.size()];
        if (!t->warp->starved) return t;
      }
      break;
    }
    case Mode::kUniform:
      break;
  }
  return ready[random.below(ready.size())];
}

// Lets delayed operations take effect, by chance.
void advance_memory() {
  Random& random = grid->random;
  Cluster& cluster = *grid->clusters[random.below(grid->clusters.size())];
  Block& block = *cluster.blocks[random.below(cluster.blocks.size())];
  if (!block.flights.empty() && random.chance(grid->mode.land)) land_one(block, true);
  if (!block.stores.empty() && random.chance(grid->mode.drain)) drain_one(block, false);
}

// One of them, if there is one; of the stores that are held only if `held`.
bool force_memory(bool held) {
  Random& random = grid->random;
  std::vector<Block*> blocks;
  for (auto& cluster : grid->clusters) {
    for (auto& block : cluster->blocks) blocks.push_back(block.get());
  }
  const size_t from = random.below(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    Block& block = *blocks[(from + i) % blocks.size()];
    const bool store_first = random.chance(0.5);
    if (store_first && drain_one(block, held)) return true;
    if (land_one(block, false)) return true;
    if (drain_one(block, held)) return true;
  }
  return false;
}

// When nothing goes on: delayed operations take effect, at most so many; or else threads that
// pause go on; or else stores that are held take effect. False if there are none of these.
bool stir(size_t most) {
  for (const bool held : {false, true}) {
    size_t done = 0;
    while (done < most && force_memory(held)) ++done;
    if (done > 0) return true;
    if (grid->paused.empty()) continue;
    wake_all(grid->paused);
    return true;
  }
  return false;
}

std::string who_waits() {
  std::map<std::string, std::pair<uint64_t, const Thread*>> places;
  uint64_t done = 0, all = 0;
  for (auto& cluster : grid->clusters) {
    for (auto& block : cluster->blocks) {
      for (auto& t : block->threads) {
        ++all;
        if (t->wait == Wait::kDone) {
          ++done;
          continue;
        }
        auto& [count, first] = places[t->wait == Wait::kNone ? "running" : t->waits_at];
        if (count++ == 0) first = t.get();
      }
    }
  }
  std::string text;
  for (auto& [what, who] : places) {
    text += (text.empty() ? "" : "; ") + number(who.first) + " at " + what +
            " (first: " + name(*who.second) + ")";
  }
  return text + "; " + number(done) + " of " + number(all) + " resident threads have exited";
}

void let_next_start(Block& block) {
  if (!block.lets_next_start) --grid->held_back;
  block.lets_next_start = true;
}

void run_one() {
  if (grid->ready.empty()) {
    if (!stir(1)) grid->error = "deadlock: " + who_waits();
    return;
  }
  const uint64_t patience = 16 * grid->ready.size() + 256;
  if (++grid->quiet > 64 * patience + 20000) {
    grid->error = "livelock, nothing changes any more: " + who_waits();
    return;
  }
  if (grid->tick > 100'000'000) {
    grid->error = "more steps than the simulator takes: " + who_waits();
    return;
  }
  // Many at a time where many threads poll, or a large grid would take for ever.
  if (grid->quiet % patience == 0) stir(1 + grid->ready.size() / 64);
  advance_memory();
  if (!grid->error.empty()) return;
  ++grid->tick;
  Thread* t = choose();
  grid->running = t;
  fiber_switch(grid->scheduler, t->fiber);
  if (t->wait != Wait::kDone) return;
  happened();
  Thread* last = grid->ready.back();
  grid->ready[t->position] = last;
  last->position = t->position;
  grid->ready.pop_back();
  Block& block = *t->block;
  Cluster& cluster = *block.cluster;
  if (--block.live == 0) {
    end_shared(block);
    let_next_start(block);
  }
  end_cluster_thread(*t);
  grid->running = nullptr;
  if (cluster.live == 0 && grid->error.empty()) end_cluster(cluster);
}

void check_launch(const cuda::Launch& how) {
  auto refuse = [](const std::string& sentence) {
    throw std::runtime_error(std::string("CUDA kernel ") + grid->kernel + ": " + sentence);
  };
  const uint64_t blocks = uint64_t{how.grid.x} * how.grid.y * how.grid.z;
  if (blocks == 0) refuse("the grid has no blocks");
  if (grid->block_threads() < 1 || grid->block_threads() > 1024) {
    refuse("a block of " + number(static_cast<uint64_t>(grid->block_threads())) +
           " threads, 1 to 1024 are possible");
  }
  if (how.grid.y > 65535 || how.grid.z > 65535) refuse("grid.y and grid.z are at most 65535");
  if (how.smem > kSharedLimit) {
    refuse(number(how.smem) + " bytes of shared memory, there are " + number(kSharedLimit));
  }
  if (how.cluster < 1 || how.cluster > 16 || how.grid.x % static_cast<unsigned>(how.cluster) != 0) {
    refuse("grid.x must be a multiple of the cluster size, which is 1 to 16");
  }
}

std::map<const void*, size_t>& allowed_shared_memory() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}

std::unique_ptr<Grid> make_grid(const char* kernel, const cuda::Launch& how,
                                const std::function<void()>& body) {
  auto made = std::make_unique<Grid>(kernel, how, body, next_seed);
  grid = made.get();
  Random& random = made->random;
  next_seed = random.next();
  made->mode = choose_mode(random);
  check_launch(how);
  const unsigned blocks = how.grid.x * how.grid.y * how.grid.z;
  const auto step = static_cast<unsigned>(how.cluster);
  auto& order = made->order;
  for (unsigned i = 0; i < blocks; i += step) order.push_back(i);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  made->resident = how.cooperative ? order.size() : made->mode.resident;
  made->held_back = blocks;
  if (made->resident * step * static_cast<size_t>(made->block_threads()) > kMostThreads) {
    throw std::runtime_error(std::string("CUDA kernel ") + kernel +
                             ": too many resident threads for the simulator");
  }
  return made;
}

// Starts the clusters there is room for and runs one thread.
void advance() {
  if (grid->started == 0) fiber_adopt(grid->scheduler);
  while (grid->started < grid->order.size() && grid->clusters.size() < grid->resident) {
    start_cluster(grid->order[grid->started++]);
  }
  run_one();
}

// In their order, but for programmatic ones: each starts when all blocks of the one before let it.
void run_all(Launches& launches) {
  size_t oldest = 0, next = 0, seen = 0;  // not ended, not started, not known to the host
  Grid* failed = nullptr;
  while (failed == nullptr && oldest < launches.size()) {
    while (next < launches.size()) {
      Grid& later = *launches[next];
      if (oldest < next) {
        if (!later.how.programmatic || launches[next - 1]->held_back > 0) break;
        constexpr double kEager[] = {0.1, 0.5, 0.99};
        later.ahead = launches[next - 1].get();
        later.eager = kEager[later.random.below(3)];
      }
      ++next;
    }
    size_t i = next - 1;
    auto runs = [&](Grid& later) {
      return !later.done() && (!later.ready.empty() || later.started == 0) &&
             later.random.chance(later.eager);
    };
    while (i > oldest && !runs(*launches[i])) --i;
    grid = launches[i].get();
    advance();
    if (!grid->error.empty()) failed = grid;
    if (grid->done() && i + 1 < next) {
      grid = launches[i + 1].get();
      wake_all(grid->dependents);
    }
    while (oldest < next && launches[oldest]->done()) ++oldest;
    if (oldest == next) {
      for (; seen < next; ++seen) launches[seen]->end.acquire();
    }
  }
  for (auto& launched : launches) {
    grid = launched.get();
    while (!grid->clusters.empty()) end_cluster(*grid->clusters.back());
  }
  stacks.launch_ended();
  for (; seen < next; ++seen) launches[seen]->end.acquire();
  if (failed != nullptr) {
    throw std::runtime_error(std::string("CUDA kernel ") + failed->kernel + ": " + failed->error);
  }
}

}  // namespace

std::string number(uint64_t n) { return std::to_string(n); }

void set_seed(uint64_t seed) { next_seed = seed; }
void set_script(const std::string& pause, int block, int warp, int64_t late) {
  script = {pause, block, warp, late};
}

void report(const Thread& thread, const std::string& sentence) {
  if (grid->error.empty()) grid->error = name(thread) + ": " + sentence;
}

void fail(const std::string& sentence) {
  Thread& t = *grid->running;
  report(t, sentence);
  fiber_switch(t.fiber, grid->scheduler, true);
  __builtin_trap();
}

void require(bool ok, const char* sentence) {
  if (!ok) fail(sentence);
}

void happened() { grid->quiet = 0; }

void wake(Thread* t) {
  t->wait = Wait::kNone;
  t->position = grid->ready.size();
  grid->ready.push_back(t);
}

void wake_all(std::vector<Thread*>& threads) {
  for (Thread* t : threads) wake(t);
  threads.clear();
  happened();
}

void wait(Wait how, const char* what) {
  Thread* t = grid->running;
  t->wait = how;
  t->waits_at = what;
  Thread* last = grid->ready.back();
  grid->ready[t->position] = last;
  last->position = t->position;
  grid->ready.pop_back();
  fiber_switch(t->fiber, grid->scheduler);
}

void pause(const char* where) {
  Thread* t = grid->running;
  const bool mine = static_cast<int>(t->block->index.x) == script.block &&
                    (script.warp < 0 || static_cast<int>(t->index.x / 32) == script.warp);
  if (!mine || script.pause != where) return;
  grid->paused.push_back(t);
  wait(Wait::kPause, where);
}

bool comes_late(uint64_t value) {
  if (script.late < 0) return grid->random.chance(grid->mode.hold);
  return value == static_cast<uint64_t>(script.late);
}

void yield() { fiber_switch(grid->running->fiber, grid->scheduler); }

uint3 thread_index() { return grid->running->index; }
uint3 block_index() { return grid->running->block->index; }
dim3 block_size() { return grid->how.block; }
dim3 grid_size() { return grid->how.grid; }
uint64_t ticks() {
  yield();
  return grid->tick;
}

void dependency_launch() {
  let_next_start(*grid->running->block);
  happened();
  yield();
}

void dependency_wait() {
  Grid* ahead = grid->ahead;
  if (ahead == nullptr) return;
  if (!ahead->done()) {
    grid->dependents.push_back(grid->running);
    wait(Wait::kDependency, "dependency_wait");
  }
  ahead->end.acquire();
}

void allow_shared_memory(const void* kernel, size_t bytes) {
  allowed_shared_memory()[kernel] = bytes;
}

void check_shared_memory(const char* name, const void* kernel, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  const auto found = allowed_shared_memory().find(kernel);
  if (bytes <= (found == allowed_shared_memory().end() ? kWithoutAsking : found->second)) return;
  throw std::runtime_error(std::string("CUDA kernel ") + name +
                           ": more shared memory than allow_shared_memory was told of");
}

std::vector<std::string> launched() { return std::exchange(names, {}); }

void run(const char* kernel, const cuda::Launch& how, const std::function<void()>& body) {
  names.push_back(kernel);
  Launches alone;
  Launches& launches = queue != nullptr ? *queue : alone;
  launches.push_back(make_grid(kernel, how, body));
  if (queue == nullptr) run_all(launches);
}

void finish() {
  if (queue == nullptr) return;
  run_all(*queue);
  queue->clear();
}

void overlapping(const std::function<void()>& host) {
  Launches launches;
  queue = &launches;
  try {
    host();
  } catch (...) {
    queue = nullptr;
    throw;
  }
  queue = nullptr;
  run_all(launches);
}

}  // namespace frnn::sim
