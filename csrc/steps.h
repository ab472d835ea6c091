// SPDX-License-Identifier: Apache-2.0
// What a step does beside its product, for a few units of one row: which state enters it, the cell,
// and where its results go. Lengths, resets and both directions of time live here and in
// timeline.h; the drivers of all devices share it and bring the products, the order and the
// threads.
//
// kVariants: there may be noise, or norms, which come between parts of a step. Where it is false
// the compiler leaves out what has to do with them.
//
// V is the value type the cell computes in, S the type of storage, A that of what must not be
// rounded to S: cell states and running gradients.
//
// kPlain promises that the row is computed from the step before and goes on into the next one, so
// that nothing need be asked: no lengths, no resets, not the first or last step.
//
// Steps are offered whole, with all that passes between them in arrays, and in parts, for a driver
// that carries it in registers and has something to send before it stores.
#pragma once

#include "timeline.h"

namespace frnn {

// n units of one row within a [B, units] array, at most the lanes of V.
struct Place {
  int64_t row, unit, offset;
  int n;
};

template <int kLanes, bool kWhole = false>
FRNN_FN Place place(int64_t row, int64_t block, int64_t units) {
  const int64_t unit = block * kLanes, rest = units - unit;
  return {row, unit, row * units + unit, kWhole || rest > kLanes ? kLanes : static_cast<int>(rest)};
}

template <class V, class S>
FRNN_FN V load_or_zero(const S* p, int64_t offset, int n) {
  return p ? load<V>(p + offset, n) : V{};
}

// The parameters of the units at p, beside the weights; those of a cell that has none hold nothing.
template <class Cell, class V>
struct Params {
  V value[Cell::kParams > 0 ? Cell::kParams : 1];
};
template <class Cell, class V, class S>
FRNN_FN Params<Cell, V> read_params(const S* params, int64_t hidden, const Place& p) {
  Params<Cell, V> of_units{};
  for (int k = 0; k < Cell::kParams; ++k) {
    of_units.value[k] = load<V>(params + k * hidden + p.unit, p.n);
  }
  return of_units;
}

// What zoneout does to the states h and c.
template <class V, class A, bool kThere>
class Zoneout {
 public:
  FRNN_FN explicit Zoneout(const Noise<A>* noise)
      : n_(noise),
        h_(kThere && (noise->renew_h || noise->rate_h != A(1))),
        c_(kThere && (noise->renew_c || noise->rate_c != A(1))) {}

  FRNN_FN bool of_h() const { return kThere && h_; }
  FRNN_FN bool of_c() const { return kThere && c_; }

  // The share of the new value, of n units from an offset on in [T, B, P] or [T, B, H].
  FRNN_FN V share_h(int64_t offset, int n) const {
    return n_->renew_h ? load_bytes<V>(n_->renew_h + offset, n) : broadcast<V>(n_->rate_h);
  }
  FRNN_FN V share_c(int64_t offset, int n) const {
    return n_->renew_c ? load_bytes<V>(n_->renew_c + offset, n) : broadcast<V>(n_->rate_c);
  }

 private:
  const Noise<A>* n_;
  bool h_, c_;
};

template <class Cell, class V, class S, class A, bool kVariants = false>
class ForwardSteps {
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates;

 public:
  // What a driver provides when backward will not ask for it: h [2, B, P] and states [S-1, B, H]
  // between steps, both null if it carries them; m [B, H]. With noise, `dropped` [2, B, P] is for
  // what the product takes in place of h, or null without dropout.
  FRNN_FN ForwardSteps(const ForwardArgs<S, A>& args, S* h, A* states, S* m,
                       const Noise<A>* noise = nullptr, S* dropped = nullptr,
                       ResetStates<const S> reset = {})
      : a_(args),
        timeline_(args),
        h_(h),
        states_(states),
        m_(m),
        zoneout_(noise),
        dropout_(kVariants ? noise->dropout : nullptr),
        dropped_(dropped),
        reset_(reset) {}

  FRNN_FN const Timeline<S>& timeline() const { return timeline_; }

  // The h that enters step s, [B, P]. Without training two buffers take turns: a thread may write
  // the next one while another still reads this one.
  FRNN_FN S* h_in(int64_t s) const {
    return a_.h_prev ? a_.h_prev + timeline_.time(s) * a_.b * a_.p : h_ + s % 2 * a_.b * a_.p;
  }

  // What of it enters the product with W_hh.
  FRNN_FN const S* product_in(int64_t s) const { return drops() ? dropped_in(s) : h_in(s); }

  // The output of the cell before its projection, [B, H].
  FRNN_FN S* m_at(int64_t s) const { return a_.m ? a_.m + timeline_.time(s) * a_.b * a_.h : m_; }

  // What enters step 0, and the final state of a row without steps: h at p, within [B, P], or the
  // other states at p, within [B, H].
  FRNN_FN void start_h(const Place& p) const {
    start(p, a_.h0, anew(0), keeps(0) ? h_in(0) : nullptr, a_.h_n);
    if (drops()) drop(0, p, entering(timeline_.entry(0, p.row), p, a_.h0, anew(0), V{}));
  }
  FRNN_FN void start_others(const Place& p) const {
    for (int j = 1; j < kStates; ++j) {
      const int64_t plane = (j - 1) * a_.b * a_.h;
      start(p, a_.c0 + plane, anew(j), keeps(0) ? state_in(0, j) : nullptr, a_.c_n + plane);
    }
  }

  // The state j at p, within [B, H], that enters a step by `entry`, where the step before left x.
  FRNN_FN V entering(Entry entry, const Place& p, int j, V x) const {
    return entering(entry, p, j == 0 ? a_.h0 : a_.c0 + (j - 1) * a_.b * a_.h, anew(j), x);
  }

  // What the cell at step s reads beside its two products.
  struct Inputs {
    V state[kStates];  // h only if the cell reads it
    V b_hh[kGates];    // that of a cell that is not additive
    Params<Cell, V> params;
  };
  FRNN_FN Inputs read_cell(int64_t s, const Place& p) const {
    Inputs in{};
    if (Cell::kReadsH) in.state[0] = load<V>(h_in(s) + p.offset, p.n);
    for (int j = 1; j < kStates; ++j) in.state[j] = load<V>(state_in(s, j) + p.offset, p.n);
    read_of_units(p, in);
    return in;
  }
  // What is the same at every step.
  FRNN_FN void read_of_units(const Place& p, Inputs& in) const {
    in.params = read_params<Cell, V>(a_.params, a_.h, p);
    for (int g = 0; g < kGates; ++g) {
      if (!Cell::kAdditive && a_.b_hh) in.b_hh[g] = load<V>(a_.b_hh + g * a_.h + p.unit, p.n);
    }
  }

  // The cell at step s; its output goes to m, or is the step's.
  template <bool kPlain>
  FRNN_FN void finish_cell(int64_t s, const Place& p, const V* gx, const V* gh,
                           const Inputs& in) const {
    const bool computed = kPlain || timeline_.computed(s, p.row);
    const Outcome result = computed ? compute(gx, gh, in) : Outcome{};
    keep_cell<kPlain>(s, p, in, result);
    keep_output<kPlain>(s, p, result.out[0]);
  }

  // In place of it at an idle step, for a driver whose products pass by rows that are not computed:
  // it leaves what backward reads as it is.
  FRNN_FN void pad(int64_t s, const Place& p) const {
    const int64_t offset = timeline_.time(s) * a_.b * a_.h + p.offset;
    if (kStates > 1 && a_.c) store(a_.c + offset, V{}, p.n);
    if (!a_.w_hr) store(a_.y + offset, V{}, p.n);
  }

  // What the cell makes of it; and the way to arrays, where it is zeros if the step is not
  // computed.
  struct Outcome {
    V out[kStates], saved[Cell::kSaved];
  };
  FRNN_FN Outcome compute(const V* gx, const V* product, const Inputs& in) const {
    Outcome result;
    V gh[kGates];
    for (int g = 0; g < kGates; ++g) {
      gh[g] = product[g];
      if (!Cell::kAdditive) gh[g] += in.b_hh[g];
    }
    Cell::forward(gx, gh, in.state, in.params.value, result.out, result.saved);
    return result;
  }
  template <bool kPlain>
  FRNN_FN void keep(int64_t s, const Place& p, const Outcome& result) const {
    keep_states<kPlain>(s, p, result);
    keep_output<kPlain>(s, p, result.out[0]);
  }
  template <bool kPlain>
  FRNN_FN void keep_cell(int64_t s, const Place& p, const Inputs& in, Outcome result) const {
    if constexpr (kVariants && kStates > 1) {
      if (zoneout_.of_c() && (kPlain || timeline_.computed(s, p.row))) {
        const V share = zoneout_.share_c(timeline_.time(s) * a_.b * a_.h + p.offset, p.n);
        result.out[1] = share * result.out[1] + (1.0f - share) * in.state[1];
      }
    }
    keep_states<kPlain>(s, p, result);
  }
  template <bool kPlain>
  FRNN_FN void keep_states(int64_t s, const Place& p, const Outcome& result) const {
    const int64_t t = timeline_.time(s), plane = a_.b * a_.h;
    if (a_.saved) {
      for (int r = 0; r < Cell::kSaved; ++r) {
        store(a_.saved + (r * a_.t + t) * plane + p.offset, result.saved[r], p.n);
      }
    }
    if (kStates > 1 && a_.c) store(a_.c + t * plane + p.offset, result.out[kStates > 1], p.n);
    for (int j = 1; j < kStates; ++j) {
      const int64_t offset = (j - 1) * plane;
      A* next = keeps(s + 1) ? state_in(s + 1, j) : nullptr;
      pass_on<kPlain>(s, p, result.out[j], a_.c0 + offset, anew(j), next, a_.c_n + offset);
    }
  }
  // Of the cell's h.
  template <bool kPlain>
  FRNN_FN void keep_output(int64_t s, const Place& p, V h) const {
    if (a_.w_hr) {
      store(m_at(s) + p.offset, h, p.n);
    } else {
      finish_output<kPlain>(s, p, h);
    }
  }

  // NaN in place of all that is returned.
  FRNN_FN void spoil(const Place& p) const {
    const V nan = V(0) / V(0);
    for (int64_t t = 0; t < a_.t; ++t) {
      store(a_.y + t * a_.b * a_.p + p.offset, nan, p.n);
      if (kStates > 1 && a_.c) store(a_.c + t * a_.b * a_.h + p.offset, nan, p.n);
    }
    store(a_.h_n + p.offset, nan, p.n);
    for (int j = 1; j < kStates; ++j) {
      store(a_.c_n + (j - 1) * a_.b * a_.h + p.offset, nan, p.n);
    }
  }

  // The output of step s, after the projection if there is one.
  template <bool kPlain>
  FRNN_FN void finish_output(int64_t s, const Place& p, V h) const {
    const int64_t offset = timeline_.time(s) * a_.b * a_.p + p.offset;
    if constexpr (kVariants) {
      if (zoneout_.of_h()) {
        const V share = zoneout_.share_h(offset, p.n);
        h = share * h + (1.0f - share) * load<V>(h_in(s) + p.offset, p.n);
      }
    }
    if (!kPlain && !timeline_.computed(s, p.row)) h = V{};
    store(a_.y + offset, h, p.n);
    S* next = keeps(s + 1) ? h_in(s + 1) : nullptr;
    const V entered = pass_on<kPlain>(s, p, h, a_.h0, anew(0), next, a_.h_n);
    if (drops() && next) drop(s + 1, p, entered);
  }

 private:
  // The j-th of the other states that enter step s, [B, H]. Only its owner touches an element, so
  // without training one buffer is overwritten in place.
  FRNN_FN A* state_in(int64_t s, int j) const {
    const int64_t plane = a_.b * a_.h;
    return a_.h_prev ? a_.c_prev + ((j - 1) * a_.t + timeline_.time(s)) * plane
                     : states_ + (j - 1) * plane;
  }

  FRNN_FN bool drops() const { return kVariants && dropout_; }
  FRNN_FN S* dropped_in(int64_t s) const { return dropped_ + s % 2 * a_.b * a_.p; }
  FRNN_FN void drop(int64_t s, const Place& p, V h) const {
    if constexpr (kVariants) {
      store(dropped_in(s) + p.offset, h * load<V>(dropout_ + p.offset, p.n), p.n);
    }
  }

  // Whether what enters step s has a place in an array.
  FRNN_FN bool keeps(int64_t s) const { return s < a_.t && (a_.h_prev || h_); }

  // State j at resets, [P] or [H], or null: zeros.
  FRNN_FN const S* anew(int j) const {
    if (!kVariants || reset_.h == nullptr) return nullptr;
    return j == 0 ? reset_.h : reset_.c + (j - 1) * a_.h;
  }

  FRNN_FN V entering(Entry entry, const Place& p, const S* initial, const S* anew,
                     V carried) const {
    if (entry == Entry::kInitial) return load<V>(initial + p.offset, p.n);
    if constexpr (kVariants) {
      if (entry == Entry::kReset && anew) return load<V>(anew + p.unit, p.n);
    }
    return entry == Entry::kCarried ? carried : V{};
  }

  template <class E>
  FRNN_FN void start(const Place& p, const S* initial, const S* anew, E* next, S* final) const {
    if (timeline_.length(p.row) == 0) {
      store(final + p.offset, load<V>(initial + p.offset, p.n), p.n);
    }
    if (next) {
      store(next + p.offset, entering(timeline_.entry(0, p.row), p, initial, anew, V{}), p.n);
    }
  }

  // Sends a state computed at step s to where it goes: into the next step, to the final states.
  // Returns what enters the next step.
  template <bool kPlain, class E>
  FRNN_FN V pass_on(int64_t s, const Place& p, V x, const S* initial, const S* anew, E* next,
                    S* final) const {
    if (!kPlain) {
      if (timeline_.computed(s, p.row) && timeline_.last(s, p.row)) store(final + p.offset, x, p.n);
      x = entering(timeline_.entry(s + 1, p.row), p, initial, anew, x);
    }
    if (next) store(next + p.offset, x, p.n);
    return x;
  }

  const ForwardArgs<S, A>& a_;
  const Timeline<S> timeline_;
  S* const h_;
  A* const states_;
  S* const m_;
  const Zoneout<V, A, kVariants> zoneout_;
  const A* const dropout_;
  S* const dropped_;
  const ResetStates<const S> reset_;
};

// Steps run from s = T-1 down to -1. At step s the gradient of its h is gathered: dy, the gradient
// of the final state, and what flows back from the step after, dgh @ W_hh + ds. Step -1 only
// gathers what belongs to h0. dh0 and dc0 double as the running ds: what a step leaves there is
// either taken up by the step before or is the row's result.
//
// To is where a step leaves the gradients that products take up.
template <class Cell, class V, class S, class A, bool kVariants = false,
          class To = StepGradients<S>>
class BackwardSteps {
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates;

 public:
  // `apart`: something comes between the gradient of h and the cell, be there a projection or not.
  FRNN_FN explicit BackwardSteps(const BackwardArgs<S, A>& args, const Noise<A>* noise = nullptr,
                                 bool apart = false, ResetStates<S> dreset = {})
      : a_(args),
        timeline_(args),
        apart_(kVariants && apart),
        zoneout_(noise),
        dropout_(kVariants ? noise->dropout : nullptr),
        dreset_(dreset) {}

  FRNN_FN const Timeline<S>& timeline() const { return timeline_; }

  // A row without steps hands the gradient of its final state straight to its initial state.
  FRNN_FN void start_h(const Place& p) const {
    const S* d = timeline_.length(p.row) == 0 ? a_.dh_n : nullptr;
    store(a_.dh0 + p.offset, load_or_zero<V>(d, p.offset, p.n), p.n);
    if constexpr (kVariants) {
      if (resets_to_states()) store(dreset(0) + p.offset, V{}, p.n);
    }
  }
  FRNN_FN void start_others(const Place& p) const {
    const S* d = timeline_.length(p.row) == 0 ? a_.dc_n : nullptr;
    for (int j = 1; j < kStates; ++j) {
      const int64_t offset = (j - 1) * a_.b * a_.h + p.offset;
      store(a_.dc0 + offset, load_or_zero<V>(d, offset, p.n), p.n);
      if constexpr (kVariants) {
        if (resets_to_states()) store(dreset(j) + p.offset, V{}, p.n);
      }
    }
    for (int k = 0; k < Cell::kParams; ++k) store(dparams(k, p), V{}, p.n);
  }

  // Whether dgh @ W_hh of step s + 1 reaches step s or a state from outside in this row.
  FRNN_FN bool flows_back(int64_t s, int64_t row) const {
    const Entry next = timeline_.entry(s + 1, row);
    if constexpr (kVariants) {
      if (next == Entry::kReset) return resets_to_states();
    }
    return next == Entry::kCarried || next == Entry::kInitial;
  }

  // Call fetch(address) for what read_h and read_cell read of arrays that are read once, and that
  // no cache holds.
  template <class Fetch>
  FRNN_FN void fetch_h(int64_t s, const Place& p, const Fetch& fetch) const {
    if (a_.dy) fetch(a_.dy + timeline_.time(s) * a_.b * a_.p + p.offset);
  }
  template <class Fetch>
  FRNN_FN void fetch_cell(int64_t s, const Place& p, const Fetch& fetch) const {
    const int64_t t = timeline_.time(s), plane = a_.b * a_.h;
    const int64_t offset = t * plane + p.offset;
    for (int r = 0; r < Cell::kSaved; ++r) fetch(a_.saved + r * a_.t * plane + offset);
    for (int j = 1; j < kStates; ++j) fetch(a_.c_prev + (j - 1) * a_.t * plane + offset);
    if (Cell::kReadsH) fetch(a_.h_prev + offset);
    if (kStates > 1 && a_.dc) fetch(a_.dc + offset);
  }

  // What the gradient of h at step s is made of, beside the product.
  struct OfH {
    V carried;  // from the step after, if the cell reads h or h is in zones
    V last;     // the gradient of the final state
    V dy;
  };
  template <bool kPlain>
  FRNN_FN OfH read_h(int64_t s, const Place& p) const {
    OfH in{};
    if (carries_h()) in.carried = load<V>(a_.dh0 + p.offset, p.n);
    if (!kPlain) {
      if (s < 0 || !timeline_.computed(s, p.row)) return in;
      if (timeline_.last(s, p.row)) in.last = load_or_zero<V>(a_.dh_n, p.offset, p.n);
    }
    in.dy = load_or_zero<V>(a_.dy, timeline_.time(s) * a_.b * a_.p + p.offset, p.n);
    return in;
  }

  // What the cell at step s reads beside the gradient of its output; p is within [B, H].
  struct OfCell {
    V saved[Cell::kSaved], state[kStates];
    V dout[kStates];     // from outside, of the other states
    V carried[kStates];  // from the step after, of the other states; 0 at a row's last step
    V share_c;           // of the new c, if it is in zones
    Params<Cell, V> params;
  };
  template <bool kPlain>
  FRNN_FN OfCell read_cell(int64_t s, const Place& p) const {
    OfCell in{};
    if (!kPlain && !timeline_.computed(s, p.row)) return in;
    const int64_t t = timeline_.time(s), plane = a_.b * a_.h;
    in.params = read_params<Cell, V>(a_.params, a_.h, p);
    for (int r = 0; r < Cell::kSaved; ++r) {
      in.saved[r] = load<V>(a_.saved + (r * a_.t + t) * plane + p.offset, p.n);
    }
    if (Cell::kReadsH) in.state[0] = load<V>(a_.h_prev + t * plane + p.offset, p.n);
    const bool last = !kPlain && timeline_.last(s, p.row);
    for (int j = 1; j < kStates; ++j) {
      in.state[j] = load<V>(a_.c_prev + ((j - 1) * a_.t + t) * plane + p.offset, p.n);
      in.carried[j] = load<V>(a_.dc0 + (j - 1) * plane + p.offset, p.n);
      if (last) in.dout[j] = load_or_zero<V>(a_.dc_n, (j - 1) * plane + p.offset, p.n);
    }
    if (kStates > 1) in.dout[kStates > 1] += load_or_zero<V>(a_.dc, t * plane + p.offset, p.n);
    if constexpr (kVariants) {
      if (zoneout_.of_c()) in.share_c = zoneout_.share_c(t * plane + p.offset, p.n);
    }
    return in;
  }

  // What step s alone reads of both, in the types of storage, for a driver without projection that
  // reads it a step ahead; the gradient of the row's final states but h begins what is carried.
  struct Ahead {
    S saved[Cell::kSaved], h, dc, dy, dh_n;
    A state[kStates];
  };
  FRNN_FN Ahead read_ahead(int64_t s, const Place& p, V* carried) const {
    Ahead in{};
    if (s < 0 || !timeline_.computed(s, p.row)) return in;
    const int64_t t = timeline_.time(s), plane = a_.b * a_.h, offset = t * plane + p.offset;
    for (int r = 0; r < Cell::kSaved; ++r) in.saved[r] = a_.saved[r * a_.t * plane + offset];
    for (int j = 1; j < kStates; ++j) in.state[j] = a_.c_prev[(j - 1) * a_.t * plane + offset];
    if (Cell::kReadsH) in.h = a_.h_prev[offset];
    if (kStates > 1 && a_.dc) in.dc = a_.dc[offset];
    if (a_.dy) in.dy = a_.dy[offset];
    if (timeline_.last(s, p.row)) {
      if (a_.dh_n) in.dh_n = a_.dh_n[p.offset];
      for (int j = 1; j < kStates; ++j) {
        carried[j] = load_or_zero<V>(a_.dc_n, (j - 1) * plane + p.offset, p.n);
      }
    }
    return in;
  }
  FRNN_FN OfH of_h(const Ahead& in, const V* carried) const {
    return {carried[0], static_cast<V>(in.dh_n), static_cast<V>(in.dy)};
  }
  FRNN_FN OfCell of_cell(const Ahead& in, const V* carried) const {
    static_assert(Cell::kParams == 0);  // no such driver sums their gradients
    OfCell cell{};
    for (int r = 0; r < Cell::kSaved; ++r) cell.saved[r] = static_cast<V>(in.saved[r]);
    cell.state[0] = static_cast<V>(in.h);
    cell.dout[kStates > 1] = static_cast<V>(in.dc);
    for (int j = 1; j < kStates; ++j) {
      cell.state[j] = static_cast<V>(in.state[j]);
      cell.carried[j] = carried[j];
    }
    return cell;
  }

  // Whether the gradient of h at step s goes through the cell at once, not to a projection first.
  template <bool kPlain = false>
  FRNN_FN bool gathers_cells(int64_t s) const {
    return (kPlain || (s >= 0 && a_.w_hr == nullptr)) && !(kVariants && apart_);
  }

  // Step s from its share of dgh @ W_hh; `cell` is read only if it gathers_cells.
  template <bool kPlain>
  FRNN_FN void finish_gather(int64_t s, const Place& p, V product, const OfH& h, const OfCell& cell,
                             const To& to) const {
    if constexpr (kVariants) {
      if (dropout_) product *= load<V>(dropout_ + p.offset, p.n);
    }
    V dh = gradient_of_h(kPlain ? Entry::kCarried : timeline_.entry(s + 1, p.row), p, product, h);
    if constexpr (kVariants) {
      if (zoneout_.of_h() && (kPlain || (s >= 0 && timeline_.computed(s, p.row)))) {
        const V share = zoneout_.share_h(timeline_.time(s) * a_.b * a_.p + p.offset, p.n);
        const bool ends = !kPlain && timeline_.entry(s, p.row) == Entry::kReset;
        const V kept = (1.0f - share) * dh;
        if (ends) add_to_reset(p, 0, kept);
        store(a_.dh0 + p.offset, ends ? V{} : kept, p.n);
        dh *= share;
      }
    }
    if (gathers_cells<kPlain>(s)) {
      finish_cell<kPlain>(s, p, dh, cell, to);
    } else if (kPlain || s >= 0) {
      store(to.dh + p.offset, dh, p.n);
    }
  }

  // Of a cell with late gates, once step s is finished but for their share of dgh @ W_hh, d; what
  // entered their product goes to `entered`, [B, P], with nothing dropped.
  FRNN_FN void finish_factor(int64_t s, const Place& p, V d, const To& to, S* entered) const {
    const int64_t plane = a_.b * a_.h, offset = timeline_.time(s) * plane + p.offset;
    if constexpr (kVariants) {
      if (dropout_) d *= load<V>(dropout_ + p.offset, p.n);
    }
    V saved[Cell::kSaved], dh;
    for (int r = 0; r < Cell::kSaved; ++r) {
      saved[r] = load<V>(a_.saved + r * a_.t * plane + offset, p.n);
    }
    const V h = load<V>(a_.h_prev + offset, p.n);
    const V of_gate = Cell::backward_of_factor(h, saved, d, &dh);
    store(to.dgx + To::first(p.row, p.unit, kGates, a_.h), of_gate, p.n);
    if (timeline_.entry(s, p.row) == Entry::kReset) {
      add_to_reset(p, 0, dh);
    } else {
      store(a_.dh0 + p.offset, load<V>(a_.dh0 + p.offset, p.n) + dh, p.n);
    }
    store(entered + p.offset, saved[0] * h, p.n);
  }

  // NaN in place of all that is returned; dgx and dgh are those of all steps.
  FRNN_FN void spoil(const Place& p, S* dgx, S* dgh) const {
    const V nan = V(0) / V(0);
    for (int64_t i = 0; i < a_.t * kGates; ++i) {
      const int64_t offset =
          i / kGates * a_.b * kGates * a_.h + p.row * kGates * a_.h + i % kGates * a_.h + p.unit;
      store(dgx + offset, nan, p.n);
      store(dgh + offset, nan, p.n);
    }
    store(a_.dh0 + p.offset, nan, p.n);
    for (int j = 1; j < kStates; ++j) {
      store(a_.dc0 + (j - 1) * a_.b * a_.h + p.offset, nan, p.n);
    }
  }

  // The cell at step s from the gradient of its output.
  template <bool kPlain>
  FRNN_FN void finish_cell(int64_t s, const Place& p, V dh, const OfCell& in, const To& to) const {
    const bool computed = kPlain || timeline_.computed(s, p.row);
    keep<kPlain>(s, p, computed ? compute(dh, in) : Outcome{}, to);
  }

  // Where c is normalised on its way into h: from the gradients of what h takes of o and of c.
  template <bool kPlain>
  FRNN_FN void finish_gates(int64_t s, const Place& p, V d_o, V dc, const OfCell& in,
                            const To& to) const {
    Outcome result{};
    V of_c[2] = {V{}, in.dout[1] + in.carried[1]};
    const V kept = zone_c(in, of_c);
    Cell::backward_of_gates(in.state, in.saved, in.params.value, d_o, of_c[1] + dc, result.dgx,
                            result.dgh, result.carried, result.dparams.value);
    result.carried[1] += kept;
    keep<kPlain>(s, p, result, to);
  }

  // What the cell makes of it; what remains of that at a step with such an entry; and its way to
  // arrays.
  struct Outcome {
    V dgx[kGates], dgh[kGates];
    V carried[kStates];  // to the step before; that of h only if the cell reads it
    Params<Cell, V> dparams;
  };
  template <bool kPlain>
  FRNN_FN void keep(int64_t s, const Place& p, Outcome result, const To& to) const {
    if constexpr (kVariants && !kPlain) {
      const bool anew = timeline_.entry(s, p.row) == Entry::kReset;
      for (int j = Cell::kReadsH ? 0 : 1; j < kStates && anew; ++j) {
        add_to_reset(p, j, result.carried[j]);
      }
    }
    if (!kPlain) cut(timeline_.entry(s, p.row), result);
    keep_gates(p, result, to);
    keep_carried<kPlain>(s, p, result);
    for (int k = 0; k < Cell::kParams; ++k) {
      A* sum = dparams(k, p);
      store(sum, load<V>(sum, p.n) + result.dparams.value[k], p.n);
    }
  }

  FRNN_FN Outcome compute(V dh, const OfCell& in) const {
    Outcome result;
    V dout[kStates];
    dout[0] = dh;
    for (int j = 1; j < kStates; ++j) dout[j] = in.dout[j] + in.carried[j];
    [[maybe_unused]] V kept{};
    if constexpr (kVariants) kept = zone_c(in, dout);
    Cell::backward(in.state, in.saved, in.params.value, dout, result.dgx, result.dgh,
                   result.carried, result.dparams.value);
    if constexpr (kVariants && kStates > 1) {
      if (zoneout_.of_c()) result.carried[1] += kept;
    }
    return result;
  }
  FRNN_FN void cut(Entry entry, Outcome& result) const {
    if (entry == Entry::kNone) result = {};
    if (entry == Entry::kReset) {
      for (int j = 0; j < kStates; ++j) result.carried[j] = V{};
    }
  }
  FRNN_FN void keep_gates(const Place& p, const Outcome& result, const To& to) const {
    to.template keep<Cell>(p.row, p.unit, p.n, a_.h, result.dgx, result.dgh);
  }
  template <bool kPlain>
  FRNN_FN void keep_carried(int64_t s, const Place& p, const Outcome& result) const {
    if (!kPlain && !timeline_.computed(s, p.row)) return;
    if (Cell::kReadsH) {
      V carried = result.carried[0];
      if constexpr (kVariants) {
        if (zoneout_.of_h()) carried += load<V>(a_.dh0 + p.offset, p.n);
      }
      store(a_.dh0 + p.offset, carried, p.n);
    }
    for (int j = 1; j < kStates; ++j) {
      store(a_.dc0 + (j - 1) * a_.b * a_.h + p.offset, result.carried[j], p.n);
    }
  }

  // The whole gradient of h at a step, where the step after was entered by `next`; what flows back
  // into a state from outside is stored there. It means nothing at a step that is not computed.
  FRNN_FN V gradient_of_h(Entry next, const Place& p, V product, const OfH& in) const {
    V back = product;
    if (carries_h()) back += in.carried;
    if (next == Entry::kInitial) store(a_.dh0 + p.offset, back, p.n);
    if constexpr (kVariants) {
      if (next == Entry::kReset) add_to_reset(p, 0, product);
    }
    return next == Entry::kCarried ? back + in.last + in.dy : in.last + in.dy;
  }

 private:
  // Leaves of the gradient of c what goes to the new one; the rest is the old one's.
  FRNN_FN V zone_c(const OfCell& in, V* dout) const {
    V kept{};
    if constexpr (kStates > 1) {
      if (zoneout_.of_c()) {
        kept = (1.0f - in.share_c) * dout[1];
        dout[1] *= in.share_c;
      }
    }
    return kept;
  }

  // Of state j [B, P] or [B, H], if others than zeros enter at resets.
  FRNN_FN bool resets_to_states() const { return dreset_.h; }
  FRNN_FN S* dreset(int j) const { return j == 0 ? dreset_.h : dreset_.c + (j - 1) * a_.b * a_.h; }
  FRNN_FN void add_to_reset(const Place& p, int j, V d) const {
    if (!resets_to_states()) return;
    S* sum = dreset(j) + p.offset;
    store(sum, load<V>(sum, p.n) + d, p.n);
  }

  // Whether the gradient of h has a path to the step before that does not pass through W_hh.
  FRNN_FN bool carries_h() const { return Cell::kReadsH || zoneout_.of_h(); }

  FRNN_FN A* dparams(int k, const Place& p) const {
    return a_.dparams + k * a_.b * a_.h + p.offset;
  }

  const BackwardArgs<S, A>& a_;
  const Timeline<S> timeline_;
  const bool apart_;
  const Zoneout<V, A, kVariants> zoneout_;
  const A* const dropout_;
  const ResetStates<S> dreset_;
};

}  // namespace frnn
