// SPDX-License-Identifier: Apache-2.0
// What the engine needs from the operating system. Compiled once, for the baseline instruction set.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace frnn::cpu {

// Where slices meet. It counts slices, not threads, since a thread may own several.
class Barrier {
 public:
  explicit Barrier(int slices) : slices_(slices), missing_(slices) {}

  // Returns once all slices have arrived; this call stands for `slices` of them.
  void arrive_and_wait(int slices);

 private:
  const int slices_;
  // On their own cache lines (pairs, for the adjacent-line prefetcher): one is written by every
  // thread that arrives, the other is polled by every thread that waits.
  alignas(128) std::atomic<int> missing_;
  alignas(128) std::atomic<unsigned> generation_{0};
};

// While it lives, this thread takes subnormal numbers for zeros, where the processor can: what
// fades away in a recurrence would otherwise cost it more than all else.
class FlushToZero {
 public:
  FlushToZero();
  ~FlushToZero();
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  const uint64_t mode_;  // of before
};

// Scratch memory of this thread, aligned to a cache line, contents unspecified; valid until the
// next call. It grows and is kept until the thread ends: fresh pages from the system would cost
// more than the products of a short call.
void* workspace(size_t bytes);

// Asks for large pages behind fresh memory of some megabytes, where the system has them: a page
// fault costs as much as the cells of a whole page.
void prefer_huge_pages(void* memory, size_t bytes);

}  // namespace frnn::cpu
