// SPDX-License-Identifier: Apache-2.0
// The backward recurrence. Included by recurrence.inl inside an anonymous namespace.
//
// Steps run from s = T-1 down to -1. At step s the gradient of its h is gathered: dy, the gradient
// of the final state, and what flows back from the step after, dgh @ W_hh + ds. Step -1 only
// gathers what belongs to h0. dh0 and dc0 double as the running ds: what a step leaves there is
// either taken up by the step before or is the row's result.

template <class Cell, class T>
class Backward {
  using V = Vec<T>;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates;

 public:
  static void run(const frnn::BackwardArgs<T>& args, const frnn::cpu::Pool& pool) {
    const auto plan = plan_of(args, kGates, pool.threads);
    Carver measure(nullptr);
    Backward(args, plan, measure);
    Carver carver(frnn::cpu::workspace(measure.used()));
    Backward backward(args, plan, carver);
    run_slices(backward, plan, pool);
  }

  // One thread's part: `each` visits its slices, `meet` waits for all the others.
  template <class Each, class Meet>
  void work(const Each& each, const Meet& meet) {
    each([&](int i) { pack(slice(i)); });
    each([&](int i) { start(slice(i)); });
    meet();
    for (int64_t s = a_.t - 1; a_.t > 0 && s >= -1; --s) {
      each([&](int i) { gather(slice(i), s); });
      if (s < 0) break;
      if (plan_.by_units) meet();
      if (a_.w_hr == nullptr) continue;
      each([&](int i) { run_cells(slice(i), s); });
      if (plan_.by_units) meet();
    }
  }

 private:
  Backward(const frnn::BackwardArgs<T>& args, const frnn::cpu::Plan& plan, Carver& carver)
      : a_(args), plan_(plan), timeline_(args) {
    const int64_t lanes = kLanes<T>;
    w_hh_ = carver.take<T>(blocks_of<T>(a_.p) * lanes * kGates * a_.h);
    if (a_.w_hr) w_hr_ = carver.take<T>(blocks_of<T>(a_.h) * lanes * a_.p);
  }

  Slice slice(int i) const { return make_slice(a_, plan_, i); }

  void pack(const Slice& slice) const {
    pack_columns(a_.w_hh, a_.p, kGates * a_.h, slice.pack_output, w_hh_);
    if (a_.w_hr) pack_columns(a_.w_hr, a_.h, a_.p, slice.pack_hidden, w_hr_);
  }

  static V load_or_zero(const T* p, int64_t offset, int n) {
    return p ? frnn::load<V>(p + offset, n) : V{};
  }

  // A row without steps hands the gradient of its final state straight to its initial state.
  void start(const Slice& slice) const {
    for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
      const bool empty = timeline_.length(row) == 0;
      for (int64_t block = slice.output.begin; block < slice.output.end; ++block) {
        const Place p = place<T>(row, block, a_.p);
        frnn::store(a_.dh0 + p.offset, load_or_zero(empty ? a_.dh_n : nullptr, p.offset, p.n), p.n);
      }
      for (int j = 1; j < kStates; ++j) {
        for (int64_t block = slice.hidden.begin; block < slice.hidden.end; ++block) {
          const Place p = place<T>(row, block, a_.h);
          const int64_t offset = (j - 1) * a_.b * a_.h + p.offset;
          frnn::store(a_.dc0 + offset, load_or_zero(empty ? a_.dc_n : nullptr, offset, p.n), p.n);
        }
      }
    }
  }

  void gather(const Slice& slice, int64_t s) const {
    const auto flows_back = [&](int64_t row) {
      const Entry entry = timeline_.entry(s + 1, row);
      return entry == Entry::kCarried || entry == Entry::kInitial;
    };
    const auto finish = [&](const Tile& tile, const V* sum) { finish_gather(s, tile, sum); };
    const int64_t k = kGates * a_.h;
    const T* dgh = a_.dgh + timeline_.time(min(s + 1, a_.t - 1)) * a_.b * k;
    const auto fetch = [&](int64_t row, int64_t block) {
      if (s >= 0 && !a_.w_hr) fetch_step(s, row, block);
    };
    product<1, T>(dgh, k, slice.rows, k, w_hh_, slice.output, s % 2, flows_back, fetch, finish);
  }

  void run_cells(const Slice& slice, int64_t s) const {
    const auto computed = [&](int64_t row) { return timeline_.computed(s, row); };
    const auto finish = [&](const Tile& tile, const V* sum) { finish_cells(s, tile, sum); };
    const auto fetch = [&](int64_t row, int64_t block) { fetch_step(s, row, block); };
    product<1, T>(a_.dh + timeline_.time(s) * a_.b * a_.p, a_.p, slice.rows, a_.p, w_hr_,
                  slice.hidden, s % 2, computed, fetch, finish);
  }

  // Prefetches what step() touches and no cache holds: arrays that are read or written once.
  void fetch_step(int64_t s, int64_t row, int64_t block) const {
    const int64_t t = timeline_.time(s), plane = a_.b * a_.h;
    const int64_t offset = t * plane + row * a_.h + block * kLanes<T>;
    for (int r = 0; r < Cell::kSaved; ++r) __builtin_prefetch(a_.saved + r * a_.t * plane + offset);
    for (int j = 1; j < kStates; ++j) {
      __builtin_prefetch(a_.c_prev + (j - 1) * a_.t * plane + offset);
    }
    if (Cell::kReadsH) __builtin_prefetch(a_.h_prev + offset);
    if (a_.dy && !a_.w_hr) __builtin_prefetch(a_.dy + offset);
  }

  // After the product; plain tiles as in Forward::finish_cells.
  void finish_gather(int64_t s, const Tile& tile, const V* sum) const {
    const bool whole = (tile.block + tile.blocks) * kLanes<T> <= a_.p;
    if (timeline_.full() && s >= 0 && s + 1 < a_.t && whole && !a_.w_hr) {
      finish_gather_tile<true>(s, tile, sum);
    } else {
      finish_gather_tile<false>(s, tile, sum);
    }
  }

  // Not inlined, like Forward::finish_tile.
  template <bool kPlain>
  __attribute__((noinline)) void finish_gather_tile(int64_t s, const Tile& tile,
                                                    const V* sum) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.blocks; ++j) {
        const Place p = place<T, kPlain>(tile.row + i, tile.block + j, a_.p);
        const V dh = gradient_of_h<kPlain>(s, p, *sum++);
        if (!kPlain && s < 0) continue;
        if (!kPlain && a_.w_hr) {
          frnn::store(a_.dh + timeline_.time(s) * a_.b * a_.p + p.offset, dh, p.n);
        } else {
          step_or_skip<kPlain>(s, p, dh);
        }
      }
    }
  }

  __attribute__((noinline)) void finish_cells(int64_t s, const Tile& tile, const V* dm) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.blocks; ++j) {
        step_or_skip<false>(s, place<T>(tile.row + i, tile.block + j, a_.h), *dm++);
      }
    }
  }

  template <bool kPlain>
  FRNN_FN void step_or_skip(int64_t s, const Place& p, V dh) const {
    if (kPlain || timeline_.computed(s, p.row)) {
      step<kPlain>(s, p, dh);
    } else {
      skip(s, p);
    }
  }

  // The whole gradient of h at step s, 0 if it is not computed; what flows back into the initial
  // state is stored there.
  template <bool kPlain>
  FRNN_FN V gradient_of_h(int64_t s, const Place& p, V product) const {
    const Entry next = kPlain ? Entry::kCarried : timeline_.entry(s + 1, p.row);
    V back{};
    if (next == Entry::kCarried || next == Entry::kInitial) {
      back = product;
      if (Cell::kReadsH) back += frnn::load<V>(a_.dh0 + p.offset, p.n);
    }
    if (next == Entry::kInitial) {
      frnn::store(a_.dh0 + p.offset, back, p.n);
      back = V{};
    }
    if (!kPlain) {
      if (s < 0 || !timeline_.computed(s, p.row)) return V{};
      if (timeline_.last(s, p.row)) back += load_or_zero(a_.dh_n, p.offset, p.n);
    }
    return back + load_or_zero(a_.dy, timeline_.time(s) * a_.b * a_.p + p.offset, p.n);
  }

  template <bool kPlain>
  FRNN_FN void step(int64_t s, const Place& p, V dh) const {
    const int64_t t = timeline_.time(s), plane = a_.b * a_.h;
    V in[kStates], saved[Cell::kSaved], dout[kStates], dgx[kGates], dgh[kGates], ds[kStates];
    for (int r = 0; r < Cell::kSaved; ++r) {
      saved[r] = frnn::load<V>(a_.saved + (r * a_.t + t) * plane + p.offset, p.n);
    }
    if (Cell::kReadsH) in[0] = frnn::load<V>(a_.h_prev + t * plane + p.offset, p.n);
    dout[0] = dh;
    const T* running = !kPlain && timeline_.last(s, p.row) ? a_.dc_n : a_.dc0;
    for (int j = 1; j < kStates; ++j) {
      in[j] = frnn::load<V>(a_.c_prev + ((j - 1) * a_.t + t) * plane + p.offset, p.n);
      dout[j] = load_or_zero(running, (j - 1) * plane + p.offset, p.n);
    }
    if (kStates > 1) dout[kStates > 1] += load_or_zero(a_.dc, t * plane + p.offset, p.n);

    Cell::backward(in, saved, dout, dgx, dgh, ds);

    const int64_t gates = (t * a_.b + p.row) * kGates * a_.h + p.unit;
    for (int g = 0; g < kGates; ++g) {
      frnn::store(a_.dgx + gates + g * a_.h, dgx[g], p.n);
      if (!Cell::kAdditive) frnn::store(a_.dgh + gates + g * a_.h, dgh[g], p.n);
    }
    const bool cut = !kPlain && timeline_.entry(s, p.row) == Entry::kZero;
    if (Cell::kReadsH) frnn::store(a_.dh0 + p.offset, cut ? V{} : ds[0], p.n);
    for (int j = 1; j < kStates; ++j) {
      frnn::store(a_.dc0 + (j - 1) * plane + p.offset, cut ? V{} : ds[j], p.n);
    }
  }

  void skip(int64_t s, const Place& p) const {
    const int64_t gates = (timeline_.time(s) * a_.b + p.row) * kGates * a_.h + p.unit;
    for (int g = 0; g < kGates; ++g) {
      frnn::store(a_.dgx + gates + g * a_.h, V{}, p.n);
      if (!Cell::kAdditive) frnn::store(a_.dgh + gates + g * a_.h, V{}, p.n);
    }
  }

  const frnn::BackwardArgs<T>& a_;
  const frnn::cpu::Plan plan_;
  const Timeline<T> timeline_;
  T* w_hh_ = nullptr;  // packed
  T* w_hr_ = nullptr;  // packed
};
