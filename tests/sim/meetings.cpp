// SPDX-License-Identifier: Apache-2.0
// Barriers of blocks and clusters, and the collectives of warps.
#include "machine.h"

namespace frnn::sim {
namespace {

// A thread that comes to a barrier while its warp's collective waits for it never gets there.
void check_converged(const Thread& t, const char* what) {
  for (const Collective& c : t.warp->open) {
    if ((c.mask >> t.lane & 1) != 0) {
      fail(std::string("divergence: it reaches ") + what +
           " while lanes of its warp wait for it at " + c.what);
    }
  }
}

void complete(Warp& warp, size_t i, const Thread* caller) {
  const Collective c = warp.open[i];
  warp.open.erase(warp.open.begin() + static_cast<ptrdiff_t>(i));
  for (int lane = 0; lane < 32; ++lane) {
    Thread* t = warp.lanes[lane];
    if ((c.arrived >> lane & 1) != 0 && t != caller) wake(t);
  }
  happened();
}

// Returns the token of the collective.
Token& meet_lanes(const char* what, uint32_t mask, void* arguments, Finish finish) {
  Thread& t = *grid->running;
  Warp& warp = *t.warp;
  const uint32_t bit = 1u << t.lane;
  if ((mask & bit) == 0) fail(std::string(what) + " with a mask that lacks the calling lane");
  if (finish != nullptr && (mask & ~warp.live) != 0) {
    fail(std::string("divergence: ") + what + " waits for lanes that have exited or do not exist");
  }
  size_t i = 0;
  while (i < warp.open.size() && (warp.open[i].mask & mask) == 0) ++i;
  if (i == warp.open.size()) {
    warp.open.push_back({what, mask, 0, &warp.tokens[warp.opened++ % 8], {}});
  }
  Collective& c = warp.open[i];
  if (c.mask != mask || std::strcmp(c.what, what) != 0) {
    fail(std::string("divergence: it reaches ") + what + " while lanes of its warp wait at " +
         c.what + (c.mask != mask ? " with another mask" : ""));
  }
  Token& token = *c.token;
  if (finish == nullptr) token.release();
  c.arrived |= bit;
  c.arguments[t.lane] = arguments;
  const uint32_t missing = mask & warp.live & ~c.arrived;
  if (missing == 0) {
    if (finish != nullptr) finish(c.arguments, mask);
    complete(warp, i, &t);
    if (grid->random.chance(0.2)) yield();
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      const Thread* other = warp.lanes[lane];
      if ((missing >> lane & 1) != 0 && other->wait == Wait::kMeeting) {
        fail(std::string("divergence: ") + what + " needs lane " +
             number(static_cast<uint64_t>(lane)) + ", which waits at " + other->waits_at);
      }
    }
    wait(Wait::kCollective, what);
  }
  return token;
}

}  // namespace

void warp_collective(const char* what, uint32_t mask, void* arguments, Finish finish) {
  meet_lanes(what, mask, arguments, finish);
}

void sync_warp(uint32_t mask) {
  show_to_block(*grid->running->block, grid->running);
  meet_lanes("__syncwarp", mask, nullptr, nullptr).acquire();
}

// __syncwarp does without lanes that have exited; other collectives would have undefined results.
void end_warp(Thread& t) {
  Warp& warp = *t.warp;
  warp.live &= ~(1u << t.lane);
  for (size_t i = warp.open.size(); i-- > 0;) {
    const Collective& c = warp.open[i];
    if ((c.mask >> t.lane & 1) == 0) continue;
    if (std::strcmp(c.what, "__syncwarp") != 0) {
      fail(std::string("divergence: it exits while lanes of its warp wait for it at ") + c.what);
    }
    if ((c.mask & warp.live & ~c.arrived) == 0) complete(warp, i, &t);
  }
}

void block_barrier(const char* what, int id, int threads, bool waits) {
  Thread& t = *grid->running;
  Block& block = *t.block;
  const bool whole = std::strcmp(what, "__syncthreads") == 0;
  if (!whole && (id < 1 || id > 15)) fail("a named barrier's id is 1 to 15");
  if (!whole && (threads < 32 || threads > 1024 || threads % 32 != 0)) {
    fail("a named barrier's thread count is a multiple of 32");
  }
  if (whole) threads = grid->block_threads();
  if (waits) check_converged(t, what);
  Meeting& m = block.barriers[id];
  if (m.arrived == 0) m.threads = threads;
  if (m.threads != threads) fail(std::string(what) + " with another thread count than the others");
  show_to_block(block, &t);
  Token& token = m.tokens[m.phase % 2];
  token.release();
  if (++m.arrived == m.threads) {
    m.arrived = 0;
    ++m.phase;
    wake_all(m.waiting);
    if (grid->random.chance(0.5)) yield();
  } else if (waits) {
    m.waiting.push_back(&t);
    wait(Wait::kMeeting, what);
  }
  if (waits) token.acquire();
  if (waits) pause(what);
}

void cluster_arrive() {
  Thread& t = *grid->running;
  Cluster& cluster = *t.block->cluster;
  if (t.cluster_arrived) fail("cluster_arrive twice without cluster_wait");
  drain_for(t);
  t.cluster_arrived = true;
  t.cluster_phase = cluster.phase;
  cluster.tokens[cluster.phase % 2].release();
  if (++cluster.arrived == cluster.live) {
    cluster.arrived = 0;
    ++cluster.phase;
    wake_all(cluster.waiting);
  }
  if (grid->random.chance(0.3)) yield();
}

void cluster_wait() {
  Thread& t = *grid->running;
  Cluster& cluster = *t.block->cluster;
  if (!t.cluster_arrived) fail("cluster_wait without cluster_arrive");
  if (cluster.phase == t.cluster_phase) {
    check_converged(t, "cluster_wait");
    cluster.waiting.push_back(&t);
    wait(Wait::kMeeting, "cluster_wait");
  }
  t.cluster_arrived = false;
  cluster.tokens[t.cluster_phase % 2].acquire();
}

// The barrier is one of the threads that have not exited.
void end_cluster_thread(Thread& t) {
  Cluster& cluster = *t.block->cluster;
  --cluster.live;
  if (t.cluster_arrived && t.cluster_phase == cluster.phase) --cluster.arrived;
  if (cluster.arrived > 0 && cluster.arrived == cluster.live) {
    cluster.arrived = 0;
    ++cluster.phase;
    wake_all(cluster.waiting);
  }
}

}  // namespace frnn::sim
