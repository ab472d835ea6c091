// SPDX-License-Identifier: Apache-2.0
// The backward recurrence. Included by recurrence.inl inside an anonymous namespace.

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
      : a_(args), plan_(plan), timeline_(args), steps_(args) {
    const int64_t lanes = kLanes<T>;
    w_hh_ = carver.take<T>(blocks_of<T>(a_.p) * lanes * kGates * a_.h);
    if (a_.w_hr) w_hr_ = carver.take<T>(blocks_of<T>(a_.h) * lanes * a_.p);
  }

  Slice slice(int i) const { return make_slice(a_, plan_, i); }

  void pack(const Slice& slice) const {
    pack_columns(a_.w_hh, a_.p, a_.p, kGates * a_.h, slice.pack_output, w_hh_);
    if (a_.w_hr) pack_columns(a_.w_hr, a_.h, a_.h, a_.p, slice.pack_hidden, w_hr_);
  }

  void start(const Slice& slice) const {
    for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
      for (int64_t block = slice.output.begin; block < slice.output.end; ++block) {
        steps_.start_h(place<kLanes<T>>(row, block, a_.p));
      }
      for (int64_t block = slice.hidden.begin; block < slice.hidden.end; ++block) {
        steps_.start_others(place<kLanes<T>>(row, block, a_.h));
      }
    }
  }

  void gather(const Slice& slice, int64_t s) const {
    const auto flows_back = [&](int64_t row) { return steps_.flows_back(s, row); };
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
        const Place p = place<kLanes<T>, kPlain>(tile.row + i, tile.block + j, a_.p);
        steps_.template finish_gather<kPlain>(s, p, *sum++);
      }
    }
  }

  __attribute__((noinline)) void finish_cells(int64_t s, const Tile& tile, const V* dm) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.blocks; ++j) {
        const Place p = place<kLanes<T>>(tile.row + i, tile.block + j, a_.h);
        steps_.template finish_cell<false>(s, p, *dm++);
      }
    }
  }

  const frnn::BackwardArgs<T>& a_;
  const frnn::cpu::Plan plan_;
  const frnn::Timeline<T> timeline_;
  const frnn::BackwardSteps<Cell, V, T, T> steps_;
  T* w_hh_ = nullptr;  // packed
  T* w_hr_ = nullptr;  // packed
};
