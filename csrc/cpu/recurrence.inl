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

// Whether there are tiles. Those of values stored in bfloat16 take all products; those of float, of
// which a value has three parts, the ones of many steps at once and, with enough rows, those of
// each step, and vectors take the rest.
#if defined(FRNN_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif
template <class S>
constexpr int kParts = std::is_same_v<S, float> ? 3 : 1;

// Numbers of a tile, and of the tiles of all parts.
constexpr int64_t kPartNumbers = 512;
template <class S>
constexpr int64_t kTileNumbers = kParts<S> * kPartNumbers;
constexpr int64_t tiles_along(int64_t k) { return (k + 31) / 32; }
constexpr int64_t row_tiles(int64_t rows) { return (rows + 15) / 16; }
// Tiles along k of a piece of a left factor: those of 32 rows stay in the L1 cache, or nearly.
template <class S>
constexpr int64_t kTilesOfPiece = kParts<S> == 1 ? 16 : 8;
// .. and of those that are multiplied at once: with parts, these come from L2 soon enough.
template <class S>
constexpr int64_t kTilesAtOnce = kParts<S> == 1 ? 16 : 32;
// Blocks, of so many columns each, that many rows pass by at a time: they take a part of the L2
// cache.
template <class S>
constexpr int64_t blocks_of_panel(int64_t tiles, int64_t columns) {
  constexpr int64_t kNumbers = 16 * kTilesOfPiece<S> * kTileNumbers<S>;
  const int64_t blocks = kNumbers / (min(tiles, kTilesAtOnce<S>) * kTileNumbers<S> * columns);
  return blocks < 1 ? 1 : blocks;
}

// How a left factor lies: how many numbers lead to the next row, part, and piece.
struct LeftFactor {
  BFloat16* data;
  int64_t row, part, piece;

  template <class S>
  BFloat16* at(int64_t r, int64_t k) const {
    constexpr int64_t kDepth = 32 * kTilesOfPiece<S>;
    return data + r * row + k / kDepth * piece + k % kDepth;
  }
  template <class S>
  LeftFactor from(int64_t r, int64_t k) const {
    return {at<S>(r, k), row, part, piece};
  }
};
// Rows whose place is read, though not used, beyond the last one.
constexpr int64_t kRowsBeyond = 31;
// Numbers from row to row of a piece, with all its parts: an odd number of lines, so that what is
// used together of many rows has room in the L1 cache.
template <class S>
constexpr int64_t kRowOfPiece = (kParts<S> * kTilesOfPiece<S> | 1) * 32;
template <class S>
constexpr int64_t laid_size(int64_t rows, int64_t k) {
  const int64_t pieces = (tiles_along(k) + kTilesOfPiece<S> - 1) / kTilesOfPiece<S>;
  return (pieces * rows + kRowsBeyond) * kRowOfPiece<S>;
}
template <class S>
constexpr LeftFactor laid(BFloat16* data, int64_t rows) {
  return {data, kRowOfPiece<S>, kTilesOfPiece<S> * 32, rows * kRowOfPiece<S>};
}

// Units of some gates, as they are along k on tiles: vector by vector, and those of all gates side
// by side, with zeros after the last one of each gate.
struct UnitsOfTiles {
  int gates;
  int64_t units;  // of a gate

  int64_t size() const { return (units + 15) / 16 * 16 * gates; }
  // Which of all gates' units a vector holds that begins at k.
  Range at(int64_t k) const {
    const int64_t gate = k / 16 % gates, unit = min(k / 16 / gates * 16, units);
    const int64_t begin = gate * units + unit;
    return {begin, begin + min(16, units - unit)};
  }
};

// What a product on tiles may begin with: another one, of as many rows and columns of packed
// weights of which all tiles along k are one piece, and biases [columns][16].
struct Beginning {
  LeftFactor a;
  const BFloat16* packed;
  int64_t tiles;  // 0: none
  float* bias;
};

// Numbers that product_of_tiles() needs for its sums.
template <class S>
constexpr int64_t sums_of_tiles(int64_t rows, int64_t k, int64_t columns) {
  const int64_t kept = tiles_along(k) > kTilesAtOnce<S> ? (rows + 31) / 32 * 32 : 2 * 32;
  return kept * ((columns + 63) / 64 * 64);
}
// Rows whose outer products are summed up at a time.
constexpr int64_t kTileChunk = 512;

#if defined(FRNN_TILES)
#include "cpu/amx.inl"
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
