// SPDX-License-Identifier: Apache-2.0
// clusters CELL ROWS UNITS TIME FIRST_SEED SEEDS: runs the cluster kernels in bfloat16, forward and
// backward, under a sanitizer, which ends the program at its first find. Throws if a seed leaves
// other bits than the first. TIME: plain, masked (by lengths and resets) or reversed (masked too).
// grids, the same program with FRNN_GRIDS, runs the grid kernels.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "cuda/primitives.h"
#include "sim.h"

namespace {

using namespace frnn::cuda;
using S = __nv_bfloat16;
using Bytes = std::vector<unsigned char>;

constexpr int64_t kSteps = 4;
#if defined(FRNN_GRIDS)
constexpr bool kGrids = true;
#else
constexpr bool kGrids = false;
#endif

void require(bool ok, const char* sentence) {
  if (!ok) throw std::runtime_error(sentence);
}

struct Problem {
  int cell;
  int64_t rows, units;
  bool masked, reverse;
  std::mt19937 random{1};
  const frnn::CellFacts& facts = frnn::cell_facts(cell);
  int64_t gates = facts.gates * units, others = facts.states - 1, plane = rows * units;

  std::vector<S> gx = values(kSteps * rows * gates), w_hh = values(gates * units), w_hh_t = w_hh;
  std::vector<S> b_hh = values(gates), h0 = values(plane), c0 = values(others * plane);
  std::vector<S> dy = values(kSteps * plane), dc = values(kSteps * plane);
  std::vector<S> dh_n = values(plane), dc_n = values(others * plane);
  std::vector<int64_t> lengths;
  std::vector<unsigned char> resets;

  Problem(int cell_, int64_t rows_, int64_t units_, const std::string& time)
      : cell(cell_),
        rows(rows_),
        units(units_),
        masked(time != "plain"),
        reverse(time == "reversed") {
    for (int64_t i = 0; i < gates * units; ++i) {
      w_hh_t[static_cast<size_t>(i % units * gates + i / units)] = w_hh[static_cast<size_t>(i)];
    }
    for (int64_t i = 0; i < rows; ++i)
      lengths.push_back(static_cast<int64_t>(random() % (kSteps + 1)));
    for (int64_t i = 0; i < kSteps * rows; ++i) resets.push_back(random() % 4 == 0);
  }

  std::vector<S> values(int64_t n) {
    std::uniform_real_distribution<float> range(-0.5f, 0.5f);
    std::vector<S> array(static_cast<size_t>(n));
    for (S& value : array) value = __float2bfloat16(range(random));
    return array;
  }

  Call call(bool backward) const {
    return {rows, units, units, facts.gates, Arithmetic::kBfloat16, backward, false};
  }
  ClusterShape shape(bool backward) const {
    return cluster_shape(call(backward), simulated_device);
  }
  GridShape grid_shape(bool backward) const {
    return frnn::cuda::grid_shape(call(backward), simulated_device);
  }

  template <class Run, class Args>
  bool run_grid(Run* kernel, const Args& args, bool backward) const {
    const GridShape shape = grid_shape(backward);
    Bytes exchange(static_cast<size_t>(shape.exchange));
    uint32_t words[3] = {};
    return shape.teams > 0 && kernel(cell, {{args}, 1, exchange.data()}, shape, words, nullptr) &&
           words[0] == 0;
  }
  bool run_forward(const Forward<void, void>& f) const {
    if constexpr (kGrids) {
      return run_grid(kGridsBfloat16.forward, f, false);
    } else {
      return kClustersBfloat16.forward(cell, {{f}, 1}, shape(false), nullptr);
    }
  }
  bool run_backward(const Backward<void, void>& b, const ClusterShape& shape) const {
    if constexpr (kGrids) {
      return run_grid(kGridsBfloat16.backward, b, true);
    } else {
      return kClustersBfloat16.backward(cell, {{b}, 1}, shape, nullptr);
    }
  }

  template <class Args>
  Args args() const {
    Args a{};
    a.t = kSteps;
    a.b = rows;
    a.h = a.p = units;
    a.reverse = reverse;
    a.w_hh = w_hh.data();
    a.lengths = masked ? lengths.data() : nullptr;
    a.resets = masked ? reinterpret_cast<const bool*>(resets.data()) : nullptr;
    return a;
  }

  // All that the kernels write, to arrays that hold `fill` before.
  std::vector<Bytes> run(unsigned char fill) const {
    std::vector<Bytes> outputs;
    const auto array = [&](int64_t n, size_t size) -> void* {
      outputs.emplace_back(static_cast<size_t>(n) * size, fill);
      return outputs.back().data();
    };
    auto f = args<Forward<void, void>>();
    f.gx = gx.data();
    f.b_hh = b_hh.data();
    f.h0 = h0.data();
    f.c0 = c0.data();
    f.y = array(kSteps * plane, sizeof(S));
    f.h_n = array(plane, sizeof(S));
    f.c_n = array(others * plane, sizeof(S));
    f.c = others > 0 ? array(kSteps * plane, sizeof(S)) : nullptr;
    f.h_prev = array(kSteps * plane, sizeof(S));
    f.c_prev = array(others * kSteps * plane, sizeof(float));
    f.saved = array(facts.saved * kSteps * plane, sizeof(S));
    require(run_forward(f), "forward did not run");

    // Clusters also with one operand in shared memory, as if there were no room for two.
    const ClusterShape two = shape(true);
    for (const ClusterShape& shape :
         {two, cluster_shape_of(two.blocks, two.tiles, 1, two.warps, call(true))}) {
      auto b = args<Backward<void, void>>();
      b.w_hh_t = w_hh_t.data();
      b.dy = dy.data();
      b.dc = dc.data();
      b.dh_n = dh_n.data();
      b.dc_n = dc_n.data();
      b.h_prev = f.h_prev;
      b.c_prev = f.c_prev;
      b.saved = f.saved;
      b.dgx = array(kSteps * rows * gates, sizeof(S));
      b.dgh = facts.additive ? b.dgx : array(kSteps * rows * gates, sizeof(S));
      b.dh0 = array(plane, sizeof(float));
      b.dc0 = array(others * plane, sizeof(float));
      require(run_backward(b, shape), "backward did not run");
      if (kGrids) break;
    }
    return outputs;
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  // With room for one cluster of eight blocks by the plan, or for two.
  simulated_device = {kGrids ? 32 : 16, 90, 227 * 1024};
  const Problem problem(std::atoi(argv[1]), std::atoi(argv[2]), std::atoi(argv[3]), argv[4]);
  std::vector<Bytes> first;
  for (int i = 0; i < std::atoi(argv[6]); ++i) {
    frnn::sim::set_seed(static_cast<uint64_t>(std::atoi(argv[5]) + i));
    const auto outputs = problem.run(static_cast<unsigned char>(0xff - i));
    if (i == 0) first = outputs;
    require(outputs == first, "the results depend on the seed");
  }
  const auto print = [](const char* of, const auto& shape) {
    std::printf("%d blocks and %d tiles of a %s\n", shape.blocks, shape.tiles, of);
  };
  kGrids ? print("team", problem.grid_shape(true)) : print("cluster", problem.shape(true));
}
