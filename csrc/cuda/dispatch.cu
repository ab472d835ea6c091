// SPDX-License-Identifier: Apache-2.0
// The choice of the algorithm.
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/driver.h"
#include "cuda/primitives.h"

namespace frnn::cuda {
namespace {

// In the order of Arithmetic.
constexpr const Standard* kStandard[] = {&kStandardFloat16, &kStandardBfloat16, &kStandardTf32,
                                         &kStandardFloat32, &kStandardFloat64};
constexpr const Clusters* kClusters[] = {&kClustersFloat16, &kClustersBfloat16, &kClustersTf32};
constexpr const Grids* kGrids[] = {&kGridsFloat16, &kGridsBfloat16, &kGridsTf32};

// Whether blocks of a grid have waited for others in vain, for each device.
class Watch {
 public:
  // Where a kernel says so; null if there is no place, or if one has.
  uint32_t* words() {
    const std::lock_guard lock(mutex_);
    if (words_ == nullptr) words_ = host_words(kWords);
    return lost_ ? nullptr : words_;
  }

  // Throws if one has since this was last asked.
  void check() {
    const std::lock_guard lock(mutex_);
    if (words_ == nullptr || *const_cast<volatile uint32_t*>(words_) == 0) return;
    const std::string kernel = words_[0] == 1 ? "forward_grid" : "backward_grid";
    words_[0] = 0;
    lost_ = true;
    throw std::runtime_error("CUDA kernel " + kernel + ", called before with B = " +
                             std::to_string(words_[1]) + ", H = " + std::to_string(words_[2]) +
                             ": blocks of it waited for others in vain, and what they return is "
                             "NaN; from now on this device runs without such kernels");
  }

 private:
  static constexpr int kWords = 3;
  std::mutex mutex_;
  uint32_t* words_ = nullptr;
  bool lost_ = false;
};

Watch& watch() {
  static Watch watches[128];
  return watches[current_device_index() % 128];
}

// `words` is where kernels say that they waited in vain; without such a place none may wait.
template <class Args>
Choice choice_for(int cell, Arithmetic arithmetic, bool backward, const Sides<Args>& sides,
                  const uint32_t* words) {
  const Args& args = sides.of[0];
  const Call call{args.b,
                  args.h,
                  args.p,
                  cell_facts(cell).gates,
                  arithmetic,
                  backward,
                  args.w_hr != nullptr,
                  sides.count};
  Device device = current_device();
  device.waits = device.waits && words != nullptr;
  // Grids count their rounds in an int.
  const bool counts = args.t < INT32_MAX / kMostGridTiles;
  return args.b == 0 || args.t == 0 || !counts ? Choice{} : choose(call, device);
}

// By the algorithm that suits the call, or the standard one if the device has no room for the
// other's blocks.
template <class Args, class Run>
void run(int cell, Arithmetic arithmetic, bool backward, const Sides<Args>& sides, const Run& by) {
  watch().check();
  if (sides.of[0].b == 0) return;
  const int index = static_cast<int>(arithmetic);
  uint32_t* const words = watch().words();
  const Choice choice = choice_for(cell, arithmetic, backward, sides, words);
  const auto run_some = [&](const Sides<Args>& some) {
    if (choice.algorithm == Algorithm::kCluster && by(*kClusters[index], some, choice.cluster)) {
      return;
    }
    if (choice.algorithm == Algorithm::kGrid && some.exchange != nullptr &&
        by(*kGrids[index], some, choice.grid, words)) {
      return;
    }
    by(*kStandard[index], some);
  };
  if (choice.sides == sides.count) return run_some(sides);
  for (const Args& args : sides.of) run_some({{args}, 1, sides.exchange});
}

}  // namespace

int64_t forward_exchange_bytes(int cell, Arithmetic arithmetic, const ForwardSides& sides) {
  return choice_for(cell, arithmetic, false, sides, watch().words()).grid.exchange;
}
int64_t backward_exchange_bytes(int cell, Arithmetic arithmetic, const BackwardSides& sides) {
  return choice_for(cell, arithmetic, true, sides, watch().words()).grid.exchange;
}

void forward(int cell, Arithmetic arithmetic, const ForwardSides& sides, void* stream) {
  run(cell, arithmetic, false, sides,
      [&](const auto& driver, const ForwardSides& some, const auto&... shape) {
        return driver.forward(cell, some, shape..., stream);
      });
}

void backward(int cell, Arithmetic arithmetic, const BackwardSides& sides, void* stream) {
  run(cell, arithmetic, true, sides,
      [&](const auto& driver, const BackwardSides& some, const auto&... shape) {
        return driver.backward(cell, some, shape..., stream);
      });
}

}  // namespace frnn::cuda
