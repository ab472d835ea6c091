// SPDX-License-Identifier: Apache-2.0
// The CPU engine, generic over cell, scalar and vector width. Each recurrence_<isa>.cpp includes it
// once, after defining kVectorBytes and kSumRegisters. Everything lies in an anonymous namespace:
// the linker must never replace one instruction set's copy by another's.
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cells/cell.h"
#include "cpu/engine.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "philox.h"
#include "recurrence.h"
#include "steps.h"
#if defined(FRNN_TILES)
#include "cpu/parts.h"
#endif

namespace {

using frnn::BFloat16;
using frnn::Place;
using frnn::place;
using frnn::StepGradients;

#include "cpu/gemm.inl"
#include "cpu/outer.inl"
#include "cpu/tiles.inl"

#if defined(FRNN_TILES)
#include "cpu/amx.inl"
#include "cpu/amx_products.inl"
#else
struct TileScope {};
template <class S>
class OuterOfTiles;
#endif

// Rows of all steps from which on packed weights pay.
constexpr int64_t kPackedRows = 4;

// The part of the work one slice owns: rows x blocks of units; when the units are divided, all
// rows and its share of the blocks, else the other way round.
struct Slice {
  int index;
  Range rows;
  Range hidden;       // blocks of H
  Range output;       // blocks of P
  Range pack_hidden;  // its share of the packing, in both cases
  Range pack_output;
};

template <class T, class Args>
Slice make_slice(const Args& a, const frnn::cpu::Plan& plan, int i) {
  const int64_t hidden = blocks_of<T>(a.h), output = blocks_of<T>(a.p);
  Slice s;
  s.index = i;
  s.pack_hidden = part(hidden, i, plan.slices);
  s.pack_output = part(output, i, plan.slices);
  s.rows = plan.by_units ? Range{0, a.b} : part(a.b, i, plan.slices);
  s.hidden = plan.by_units ? s.pack_hidden : Range{0, hidden};
  s.output = plan.by_units ? s.pack_output : Range{0, output};
  return s;
}

template <class Cell, class T, class Args>
frnn::cpu::Plan plan_of(const Args& a, int threads) {
  const double macs = double(Cell::kGates) * a.h * a.p + (a.w_hr ? double(a.p) * a.h : 0);
  return frnn::cpu::make_plan({.threads = threads,
                               .rows = a.b,
                               .unit_blocks = blocks_of<T>(a.h),
                               .step_flops = 2 * macs * a.b,
                               .weight_bytes = static_cast<int64_t>(macs * sizeof(*a.w_hh)),
                               .often = a.norm.gain_hh || frnn::kLateGates<Cell> > 0});
}

// Whether tiles take the products of each step too; only they have those of bfloat16.
template <class Cell, class S, class Args>
bool steps_on_tiles(const Args& a) {
  if (!kTiles || std::is_same_v<S, BFloat16>) return kTiles;
  const int64_t numbers = Cell::kGates * a.h * a.p;
  return frnn::cpu::tiles_pay_in_steps(a.b, numbers * kParts<S> * int64_t{sizeof(BFloat16)});
}

// Hands out pieces of one workspace; a first pass with no memory measures them.
class Carver {
 public:
  explicit Carver(void* memory) : base_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    constexpr size_t kAlignment = 128;
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Which steps of which rows are computed, [T, B], written out by all slices together.
class Computed {
 public:
  template <class S>
  Computed(const frnn::SequenceArgs<S>& args, Carver& carver)
      : b_(args.b), flags_(args.lengths ? carver.take<bool>(args.t * args.b) : nullptr) {}

  template <class S>
  void fill(const frnn::Timeline<S>& timeline, Range times) const {
    if (flags_ == nullptr) return;
    for (int64_t row = 0; row < b_; ++row) {
      const int64_t length = timeline.length(row);
      for (int64_t t = times.begin; t < times.end; ++t) flags_[t * b_ + row] = t < length;
    }
  }

  // Of row r of all [T*B].
  bool operator[](int64_t r) const { return flags_ == nullptr || flags_[r]; }

  // Those of some rows, counted from the first of them; `names` has place for all.
  Rows of(Range rows, int* names) const {
    if (flags_ == nullptr) return {nullptr, rows.size()};
    int64_t count = 0;
    for (int64_t i = 0; i < rows.size(); ++i) {
      if (flags_[rows.begin + i]) names[count++] = static_cast<int>(i);
    }
    return {names, count};
  }

 private:
  const int64_t b_;
  bool* const flags_;
};

// The rows of a slice by length, long ones first, for those that are computed at a time to come
// first. Slices of units have one such list.
class Ranks {
 public:
  template <class S>
  Ranks(const frnn::SequenceArgs<S>& args, const frnn::cpu::Plan& plan, bool wanted, Carver& carver)
      : lists_(plan.by_units ? 1 : plan.slices), t_(args.t) {
    if (!wanted || args.lengths == nullptr) return;
    rows_ = carver.take<int>(args.b);
    ranks_ = carver.take<int>(args.b);
    before_ = carver.take<int64_t>(lists_ * (t_ + 1));
  }

  template <class S>
  void fill(const frnn::Timeline<S>& timeline, const Slice& slice) const {
    if (rows_ == nullptr || slice.index >= lists_) return;
    // First how many rows there are of each length, then how many are longer.
    int64_t* count = before(slice.index);
    __builtin_memset(count, 0, (t_ + 1) * sizeof(*count));
    for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) ++count[timeline.length(row)];
    for (int64_t t = t_, longer = 0; t >= 0; --t) {
      const int64_t same = count[t];
      count[t] = longer;
      longer += same;
    }
    for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
      const int64_t rank = slice.rows.begin + count[timeline.length(row)]++;
      rows_[rank] = static_cast<int>(row);
      ranks_[row] = static_cast<int>(rank);
    }
    // Now those of length t count whose length is t or more, which are computed at time t - 1.
    count[0] = 0;
    for (int64_t t = 1; t <= t_; ++t) count[t] += count[t - 1];
  }

  int64_t row(int64_t rank) const { return rows_ ? rows_[rank] : rank; }
  int64_t rank(int64_t row) const { return ranks_ ? ranks_[row] : row; }
  // How many rows are computed at all times before t.
  int64_t before(const Slice& slice, int64_t t) const {
    return before_ ? before(lists_ > 1 ? slice.index : 0)[t] : t * slice.rows.size();
  }
  // The ranks that are computed at time t.
  Range computed(const Slice& slice, int64_t t) const {
    const int64_t begin = slice.rows.begin;
    return {begin, begin + before(slice, t + 1) - before(slice, t)};
  }

 private:
  int64_t* before(int64_t list) const { return before_ + list * (t_ + 1); }

  const int64_t lists_, t_;
  int *rows_ = nullptr, *ranks_ = nullptr;
  int64_t* before_ = nullptr;
};

// Calls work(begin, end) in the pool, for ranges that cover [0, n).
template <class Work>
void in_pool(const frnn::cpu::Pool& pool, int n, Work work) {
  const auto body = [](int64_t begin, int64_t end, void* pointer) {
    const frnn::cpu::FlushToZero scope;
    (*static_cast<Work*>(pointer))(begin, end);
  };
  if (n == 1) {
    body(0, 1, &work);
  } else {
    pool.run(n, body, &work);
  }
}

// Calls f(i) in the pool for i in [0, total), in so many slices.
template <class F>
void each_in_pool(const frnn::cpu::Pool& pool, int slices, int64_t total, const F& f) {
  in_pool(pool, slices, [&](int64_t begin, int64_t end) {
    const int64_t last = part(total, static_cast<int>(end - 1), slices).end;
    for (int64_t i = part(total, static_cast<int>(begin), slices).begin; i < last; ++i) f(i);
  });
}

// Runs all slices of a worker in the pool.
template <class Worker>
void run_slices(Worker& worker, const frnn::cpu::Plan& plan, const frnn::cpu::Pool& pool) {
  frnn::cpu::Barrier barrier(plan.slices);
  in_pool(pool, plan.slices, [&](int64_t begin, int64_t end) {
    const int count = static_cast<int>(end - begin);
    const auto each = [&](auto&& work) {
      for (int64_t i = begin; i < end; ++i) work(static_cast<int>(i));
    };
    const auto meet = [&] {
      if (count < plan.slices) barrier.arrive_and_wait(count);
    };
    worker.work(each, meet);
  });
}

#include "cpu/norm.inl"

#include "cpu/backward.inl"
#include "cpu/forward.inl"
#include "cpu/mask.inl"
#include "cpu/update.inl"

template <class Cell>
constexpr bool kExists = !kTiles || frnn::kLateGates<Cell> == 0;

template <class S>
void run_forward(int cell, const frnn::cpu::ForwardArgs<S>& args, const frnn::cpu::Pool& pool) {
  frnn::Cells::dispatch(cell, [&]<class Cell>() {
    if constexpr (kExists<Cell>) Forward<Cell, frnn::Wide<S>, S>::run(args, pool);
  });
}

template <class S>
void run_backward(int cell, const frnn::cpu::BackwardArgs<S>& args, const frnn::cpu::Pool& pool) {
  frnn::Cells::dispatch(cell, [&]<class Cell>() {
    if constexpr (kExists<Cell>) Backward<Cell, frnn::Wide<S>, S>::run(args, pool);
  });
}

template <class T>
bool run_update(int cell, bool backward, const frnn::cpu::UpdateArgs<T>& args,
                const frnn::cpu::Pool& pool) {
  bool exists = false;
  frnn::Cells::dispatch(cell, [&]<class Cell>() {
    if constexpr (Update<Cell, T>::kExists) {
      exists = true;
      backward ? Update<Cell, T>::backward(args, pool) : Update<Cell, T>::forward(args, pool);
    }
  });
  return exists;
}

}  // namespace
