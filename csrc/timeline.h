// SPDX-License-Identifier: Apache-2.0
// Which step of a row is computed, and from what. Step s = 0, 1, .. is the order of computation,
// t the position in the arrays.
#pragma once

#include "numeric.h"
#include "recurrence.h"

namespace frnn {

// Where the state that enters a step comes from.
enum class Entry : uint8_t {
  kNone,     // the step is not computed
  kReset,    // a new sequence begins
  kInitial,  // h0, c0
  kCarried,  // the step before
};

template <class S>
class Timeline {
 public:
  FRNN_FN explicit Timeline(const SequenceArgs<S>& args)
      : a_(args), full_(args.lengths == nullptr && args.resets == nullptr) {}

  // Every step is computed, from the one before.
  FRNN_FN bool full() const { return full_; }

  // T - 1 - s in reverse, which is T + ~s, without a branch.
  FRNN_FN int64_t time(int64_t s) const {
    const int64_t flip = -int64_t{a_.reverse};
    return (s ^ flip) + (a_.t & flip);
  }

  FRNN_FN int64_t length(int64_t row) const {
    if (a_.lengths == nullptr) return a_.t;
    const int64_t n = a_.lengths[row];
    return n < 0 ? 0 : (n < a_.t ? n : a_.t);
  }

  FRNN_FN bool computed(int64_t s, int64_t row) const { return full_ || time(s) < length(row); }

  // Steps outside [0, T) have no entry.
  FRNN_FN Entry entry(int64_t s, int64_t row) const {
    if (s < 0 || s >= a_.t) return Entry::kNone;
    if (full_) return s == 0 ? Entry::kInitial : Entry::kCarried;
    const int64_t t = time(s), n = length(row);
    if (t >= n) return Entry::kNone;
    if (a_.reverse) {
      if (t == n - 1) return Entry::kInitial;
      return reset(t + 1, row) ? Entry::kReset : Entry::kCarried;
    }
    if (reset(t, row)) return Entry::kReset;
    return t == 0 ? Entry::kInitial : Entry::kCarried;
  }

  // This step is computed, and the next one from it.
  FRNN_FN bool goes_on(int64_t s, int64_t row) const {
    return entry(s + 1, row) == Entry::kCarried;
  }

  // Neither this step nor the next one is computed.
  FRNN_FN bool idle(int64_t s, int64_t row) const {
    return !computed(s, row) && entry(s + 1, row) == Entry::kNone;
  }

  // The last step of its row, given that it is computed.
  FRNN_FN bool last(int64_t s, int64_t row) const {
    return a_.reverse ? s == a_.t - 1 : s == length(row) - 1;
  }

 private:
  FRNN_FN bool reset(int64_t t, int64_t row) const {
    return a_.resets != nullptr && a_.resets[t * a_.b + row];
  }

  const SequenceArgs<S>& a_;
  const bool full_;
};

}  // namespace frnn
