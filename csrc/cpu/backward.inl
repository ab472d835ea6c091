// SPDX-License-Identifier: Apache-2.0
// The backward recurrence and the products that follow it. Included by recurrence.inl inside an
// anonymous namespace.
//
// The gradients of the gates are only kept for a chunk of steps, in the cache, until the products
// have taken them up: what is then added to the gradients of the weights, dx is complete.

template <class Cell, class T>
class Backward {
  using V = Vec<T>;
  using Steps = frnn::BackwardSteps<Cell, V, T, T, true>;
  static constexpr int kGates = Cell::kGates;

 public:
  static void run(const frnn::cpu::BackwardArgs<T>& args, const frnn::cpu::Pool& pool) {
    const auto plan = plan_of<T>(args, kGates, pool.threads);
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
      // What of a step's norms comes next reads what the same slice wrote.
      if (plan_.by_units && (a_.w_hr || !normalises())) meet();
      if (a_.w_hr) {
        each([&](int i) { run_cells(slice(i), s); });
        if (plan_.by_units && !normalises()) meet();
      }
      if (normalises()) {
        if (a_.norm.gain_c) {
          each([&](int i) { gather_outputs(slice(i), s); });
          if (plan_.by_units) meet();
          each([&](int i) { run_gates(slice(i), s); });
        }
        each([&](int i) { describe_products(slice(i), s); });
        if (plan_.by_units) meet();
        each([&](int i) { unnormalise_products(slice(i), s); });
        if (plan_.by_units) meet();
      }
      if (s % chunk_ != 0) continue;
      if (!plan_.by_units) meet();
      if (normalises()) {
        each([&](int i) { add_gains(slice(i), s); });
        meet();
        each([&](int i) { unnormalise_inputs(slice(i), s); });
        meet();
      }
      each([&](int i) { multiply(slice(i), s); });
    }
  }

 private:
  Backward(const frnn::cpu::BackwardArgs<T>& args, const frnn::cpu::Plan& plan, Carver& carver)
      : a_(args),
        plan_(plan),
        timeline_(args),
        computed_(args, carver),
        steps_(args, &args.noise, args.norm.gain_c != nullptr),
        of_hh_(normalises() ? a_.b : 0, a_.h, plan.slices, carver),
        of_c_(a_.norm.gain_c ? a_.b : 0, a_.h, plan.slices, carver),
        outputs_(a_.norm.gain_c ? a_.b : 0, a_.h, carver),
        chunk_(a_.b < Outer<T>::kDepth ? Outer<T>::kDepth / (a_.b > 0 ? a_.b : 1) : 1) {
    const int64_t lanes = kLanes<T>, gates = kGates * a_.h;
    const int64_t rows = min(a_.t, 2 * chunk_) * a_.b;
    w_hh_ = carver.take<T>(blocks_of<T>(a_.p) * lanes * gates);
    if (a_.w_hr) w_hr_ = carver.take<T>(blocks_of<T>(a_.h) * lanes * a_.p);
    if (a_.dx) w_ih_ = carver.take<T>(blocks_of<T>(a_.i) * lanes * gates);
    gradients_.dgx = carver.take<T>(rows * gates);
    gradients_.dgh = Cell::kAdditive ? gradients_.dgx : carver.take<T>(rows * gates);
    gradients_.dh = a_.w_hr || a_.norm.gain_c ? carver.take<T>(rows * a_.p) : nullptr;
    products_ = normalises() ? carver.take<T>(rows * gates) : gradients_.dgh;
    if (a_.w_hr && a_.norm.gain_c) dm_ = carver.take<T>(a_.b * a_.h);
    outer_ = carver.take<T>(plan.slices * Outer<T>::kScratch);
    names_ = carver.take<int>(plan.slices * chunk_ * a_.b);
  }

  Slice slice(int i) const { return make_slice(a_, plan_, i); }

  // A slice's share of `units` units in the products, in which all slices meet.
  Range share(const Slice& slice, int64_t units) const {
    return part(units, slice.index, plan_.slices);
  }

  void pack(const Slice& slice) const {
    const int64_t gates = kGates * a_.h;
    const Rows rows{nullptr, gates};
    pack_columns(a_.w_hh, a_.p, a_.p, rows, slice.pack_output, w_hh_);
    if (a_.w_hr) pack_columns(a_.w_hr, a_.h, a_.h, {nullptr, a_.p}, slice.pack_hidden, w_hr_);
    if (a_.dx) pack_columns(a_.w_ih, a_.i, a_.i, rows, share(slice, blocks_of<T>(a_.i)), w_ih_);
  }

  // Weights for products of one gate and a depth of k.
  static Packed<T> packed(const T* w, int64_t k) { return {w, k * kLanes<T>}; }

  void start(const Slice& slice) const {
    computed_.fill(timeline_, part(a_.t, slice.index, plan_.slices));
    for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
      for (int64_t block = slice.output.begin; block < slice.output.end; ++block) {
        steps_.start_h(place<kLanes<T>>(row, block, a_.p));
      }
      for (int64_t block = slice.hidden.begin; block < slice.hidden.end; ++block) {
        steps_.start_others(place<kLanes<T>>(row, block, a_.h));
      }
    }
    clear(slice, kGates * a_.h, a_.i, a_.dw_ih);
    clear(slice, kGates * a_.h, a_.p, a_.dw_hh);
    clear(slice, kGates * a_.h, 1, a_.db_ih);
    clear(slice, kGates * a_.h, 1, a_.db_hh);
    if (a_.w_hr) clear(slice, a_.p, a_.h, a_.dw_hr);
    clear(slice, kGates * a_.h, 1, a_.dgain_ih);
    clear(slice, kGates * a_.h, 1, a_.dgain_hh);
    clear(slice, 2 * a_.b, a_.h, a_.dnorm_c);
  }

  // A slice's share of w [units, columns].
  void clear(const Slice& slice, int64_t units, int64_t columns, T* w) const {
    const Range mine = share(slice, units);
    if (w) __builtin_memset(w + mine.begin * columns, 0, mine.size() * columns * sizeof(T));
  }

  // The chunk of steps that begins at step s: [steps, B, ...] in order of time.
  struct Chunk {
    int64_t time, steps;  // the first time
    StepGradients<T> gradients;
  };

  Chunk chunk(int64_t s) const {
    const int64_t steps = min(chunk_, a_.t - s);
    const int64_t time = min(timeline_.time(s), timeline_.time(s + steps - 1));
    return {time, steps, row(gradients_, s / chunk_ % 2 * chunk_ * a_.b)};
  }

  StepGradients<T> row(const StepGradients<T>& g, int64_t row) const {
    const int64_t gates = row * kGates * a_.h;
    return {g.dgx + gates, g.dgh + gates, g.dh ? g.dh + row * a_.p : nullptr};
  }

  StepGradients<T> gradients(int64_t s) const {
    const Chunk c = chunk(s - s % chunk_);
    return row(c.gradients, (timeline_.time(s) - c.time) * a_.b);
  }

  // The gradients of W_hh h itself, [B, G*H] of a step or of a chunk's.
  T* products(const StepGradients<T>& g) const { return products_ + (g.dgh - gradients_.dgh); }

  bool normalises() const { return a_.norm.gain_hh != nullptr; }
  T scale(int which, int64_t r) const { return a_.norm.scale[which * a_.t * a_.b + r]; }

  // Calls f(place, row of [T*B]) for the slice's units of the rows that are computed at step s.
  template <class F>
  void each_place(const Slice& slice, int64_t s, const F& f) const {
    for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
      if (!timeline_.computed(s, row)) continue;
      const auto of_row = f(row, timeline_.time(s) * a_.b + row);
      for (int64_t block = slice.hidden.begin; block < slice.hidden.end; ++block) {
        of_row(block, place<kLanes<T>>(row, block, a_.h));
      }
    }
  }

  // Where c is normalised: from the gradient of the cell's h to those of the gate that h takes and
  // of c's hat.
  void gather_outputs(const Slice& slice, int64_t s) const {
    if constexpr (frnn::NormalisesState<Cell>) {
      const int64_t plane = a_.b * a_.h, t = timeline_.time(s);
      const T* dm = a_.w_hr ? dm_ : gradients(s).dh;
      const T* o = a_.saved + (Cell::kOutput * a_.t + t) * plane;
      each_place(slice, s, [&](int64_t row, int64_t) {
        return [&, row](int64_t block, const Place& p) {
          const V dh = frnn::load<V>(dm + p.offset, p.n);
          const V hat = frnn::load<V>(a_.norm.hat_c + t * plane + p.offset, p.n);
          const V gain = frnn::load<V>(a_.norm.gain_c + p.unit, p.n);
          const V tanh_c = frnn::tanh(V(hat * gain + frnn::load<V>(a_.norm.bias_c + p.unit, p.n)));
          const V d = dh * frnn::load<V>(o + p.offset, p.n) * (1.0f - tanh_c * tanh_c);
          outputs_.at(row, block)[0] = dh * tanh_c;
          outputs_.at(row, block)[1] = d * gain;
          of_c_.put(row, block, sum_of_lanes<T>(d * gain), sum_of_lanes<T>(d * gain * hat));
          if (a_.dnorm_c == nullptr) return;
          add(a_.dnorm_c + p.offset, d * hat, p.n);
          add(a_.dnorm_c + plane + p.offset, d, p.n);
        };
      });
    }
  }

  static void add(T* to, V more, int n) { frnn::store(to, frnn::load<V>(to, n) + more, n); }

  void run_gates(const Slice& slice, int64_t s) const {
    if constexpr (frnn::NormalisesState<Cell>) {
      const StepGradients<T> to = gradients(s);
      of_c_.means(slice, slice.rows, 1);
      each_place(slice, s, [&](int64_t row, int64_t r) {
        const auto means = of_c_.of(slice, row);
        const T scale = this->scale(2, r);
        const bool cut = timeline_.entry(s, row) == frnn::Entry::kZero;
        const int64_t whole = timeline_.goes_on(s, row) && !cut ? a_.h / kLanes<T> : 0;
        return [&, row, r, means, scale, whole](int64_t block, const Place& p) {
          const V hat = frnn::load<V>(a_.norm.hat_c + r * a_.h + p.unit, p.n);
          const V* output = outputs_.at(row, block);
          const V dc = scale * (output[1] - means.first - hat * means.second);
          const auto finish = [&]<bool kPlain>() {
            const auto cell = steps_.template read_cell<kPlain>(s, p);
            steps_.template finish_gates<kPlain>(s, p, output[0], dc, cell, to);
          };
          if (block < whole) {
            finish.template operator()<true>();
          } else {
            finish.template operator()<false>();
          }
        };
      });
    }
  }

  void describe_products(const Slice& slice, int64_t s) const {
    const T* dgh = gradients(s).dgh;
    each_place(slice, s, [&](int64_t row, int64_t r) {
      return [&, row, r](int64_t block, const Place& p) {
        V sums[2] = {};
        for (int g = 0; g < kGates; ++g) {
          const int64_t offset = g * a_.h + p.unit;
          const V d = frnn::load<V>(dgh + row * kGates * a_.h + offset, p.n) *
                      frnn::load<V>(a_.norm.gain_hh + offset, p.n);
          sums[0] += d;
          sums[1] += d * frnn::load<V>(a_.norm.hat_hh + r * kGates * a_.h + offset, p.n);
        }
        of_hh_.put(row, block, sum_of_lanes<T>(sums[0]), sum_of_lanes<T>(sums[1]));
      };
    });
  }

  void unnormalise_products(const Slice& slice, int64_t s) const {
    const T* dgh = gradients(s).dgh;
    T* to = products(gradients(s));
    of_hh_.means(slice, slice.rows, kGates);
    each_place(slice, s, [&](int64_t row, int64_t r) {
      const auto means = of_hh_.of(slice, row);
      const T scale = this->scale(1, r);
      return [&, row, r, means, scale](int64_t, const Place& p) {
        for (int g = 0; g < kGates; ++g) {
          const int64_t offset = g * a_.h + p.unit, at = row * kGates * a_.h + offset;
          const V d = frnn::load<V>(dgh + at, p.n) * frnn::load<V>(a_.norm.gain_hh + offset, p.n);
          const V hat = frnn::load<V>(a_.norm.hat_hh + r * kGates * a_.h + offset, p.n);
          frnn::store(to + at, scale * (d - means.first - hat * means.second), p.n);
        }
      };
    });
  }

  // Of the chunk that begins at step s, for a share of the units: gradients of gains and biases.
  void add_gains(const Slice& slice, int64_t s) const {
    const Chunk c = chunk(s);
    const int64_t first = c.time * a_.b, gates = kGates * a_.h;
    const Rows rows =
        computed_.of({first, first + c.steps * a_.b}, names_ + slice.index * chunk_ * a_.b);
    const Range units = share(slice, gates);
    const StepGradients<T>& g = c.gradients;
    add_products(g.dgx, a_.norm.hat_ih + first * gates, gates, units, rows, a_.dgain_ih);
    add_products(g.dgh, a_.norm.hat_hh + first * gates, gates, units, rows, a_.dgain_hh);
    add_rows(g.dgx, gates, units, rows, a_.db_ih);
    add_rows(g.dgh, gates, units, rows, a_.db_hh);
  }

  // For a share of its rows: dgx becomes the gradient of W_ih x itself.
  void unnormalise_inputs(const Slice& slice, int64_t s) const {
    const Chunk c = chunk(s);
    const int64_t first = c.time * a_.b, gates = kGates * a_.h;
    const Range rows = share(slice, c.steps * a_.b);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      if (!computed_[first + i]) continue;
      unnormalise(c.gradients.dgx + i * gates, a_.norm.gain_ih,
                  a_.norm.hat_ih + (first + i) * gates, gates, this->scale(0, first + i));
    }
  }

  void gather(const Slice& slice, int64_t s) const {
    if (all_of(slice.rows, [&](int64_t row) { return idle(s, row); })) return;
    const auto flows_back = [&](int64_t row) { return steps_.flows_back(s, row); };
    const StepGradients<T> to = gradients(s < 0 ? 0 : s);
    const auto finish = [&](const Tile& tile, const V* sum) { finish_gather(s, tile, sum, to); };
    const int64_t k = kGates * a_.h;
    const T* dgh = products(gradients(min(s + 1, a_.t - 1)));
    const auto fetch = [&](int64_t row, int64_t block) {
      if (s >= 0 && !a_.w_hr) fetch_step(s, row, block);
    };
    product<1, T>(dgh, k, slice.rows, k, packed(w_hh_, k), slice.output, s % 2, flows_back, fetch,
                  finish);
  }

  void run_cells(const Slice& slice, int64_t s) const {
    const auto computed = [&](int64_t row) { return timeline_.computed(s, row); };
    const StepGradients<T> to = gradients(s);
    const auto finish = [&](const Tile& tile, const V* sum) {
      if (dm_) return keep_dm(tile, sum);
      finish_cells(s, tile, sum, to);
    };
    const auto fetch = [&](int64_t row, int64_t block) { fetch_step(s, row, block); };
    product<1, T>(to.dh, a_.p, slice.rows, a_.p, packed(w_hr_, a_.p), slice.hidden, s % 2, computed,
                  fetch, finish);
  }

  void keep_dm(const Tile& tile, const V* sum) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.blocks; ++j) {
        const Place p = place<kLanes<T>>(tile.row + i, tile.block + j, a_.h);
        frnn::store(dm_ + p.offset, *sum++, p.n);
      }
    }
  }

  void fetch_step(int64_t s, int64_t row, int64_t block) const {
    if (!timeline_.computed(s, row)) return;
    const auto fetch = [](const void* address) { __builtin_prefetch(address); };
    const Place p = place<kLanes<T>>(row, block, a_.h);
    if (a_.w_hr == nullptr) steps_.fetch_h(s, p, fetch);
    steps_.fetch_cell(s, p, fetch);
    if (!normalises()) return;
    const int64_t r = timeline_.time(s) * a_.b + row;
    for (int g = 0; g < kGates; ++g) fetch(a_.norm.hat_hh + (r * kGates + g) * a_.h + p.unit);
    if (a_.norm.gain_c) fetch(a_.norm.hat_c + r * a_.h + p.unit);
  }

  // Nothing was computed at the step, nor flows back to the initial state from the next one.
  bool idle(int64_t s, int64_t row) const {
    return s < 0 ? !steps_.flows_back(s, row) : timeline_.idle(s, row);
  }

  // After the product; plain ones as in Forward::finish_cells.
  void finish_gather(int64_t s, const Tile& tile, const V* sum, const StepGradients<T>& to) const {
    const int64_t whole = a_.w_hr ? 0 : a_.p / kLanes<T>;  // blocks
    if (timeline_.full() && s >= 0 && s + 1 < a_.t && tile.block + tile.blocks <= whole) {
      return finish_gather_tile<true>(s, tile, sum, to);
    }
    const auto kind_of = [&](int64_t row) {
      const bool cut = timeline_.entry(s, row) == frnn::Entry::kZero;
      return timeline_.goes_on(s, row) && !cut ? Kind::kPlain
             : idle(s, row)                    ? Kind::kIdle
                                               : Kind::kOther;
    };
    const auto finish = [&](const Tile& some, Kind kind, int64_t before) {
      if (kind == Kind::kPlain) finish_gather_tile<true>(s, some, sum + before, to);
      if (kind == Kind::kOther) finish_gather_tile<false>(s, some, sum + before, to);
    };
    by_kind(tile, whole, kind_of, finish);
  }

  // Not inlined, like Forward::finish_tile.
  template <bool kPlain>
  __attribute__((noinline)) void finish_gather_tile(int64_t s, const Tile& tile, const V* sum,
                                                    const StepGradients<T>& to) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.blocks; ++j) {
        const Place p = place<kLanes<T>, kPlain>(tile.row + i, tile.block + j, a_.p);
        const auto cell = steps_.template gathers_cells<kPlain>(s)
                              ? steps_.template read_cell<kPlain>(s, p)
                              : typename Steps::OfCell{};
        steps_.template finish_gather<kPlain>(s, p, *sum++, steps_.template read_h<kPlain>(s, p),
                                              cell, to);
      }
    }
  }

  __attribute__((noinline)) void finish_cells(int64_t s, const Tile& tile, const V* dm,
                                              const StepGradients<T>& to) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.blocks; ++j) {
        const Place p = place<kLanes<T>>(tile.row + i, tile.block + j, a_.h);
        const V dh = *dm++;
        if (!timeline_.computed(s, p.row)) continue;
        steps_.template finish_cell<false>(s, p, dh, steps_.template read_cell<false>(s, p), to);
      }
    }
  }

  // The products of the chunk of steps that begins at step s.
  void multiply(const Slice& slice, int64_t s) const {
    const Chunk c = chunk(s);
    const int64_t first = c.time * a_.b, gates = kGates * a_.h;
    const Range all{first, first + c.steps * a_.b};
    const Rows rows = computed_.of(all, names_ + slice.index * chunk_ * a_.b);
    const StepGradients<T>& g = c.gradients;
    const T* x = a_.x + first * a_.i;
    const T* h_prev = a_.h_prev + first * a_.p;
    if (a_.dx) multiply_dx(slice, g.dgx, all);
    const Outer<T> outer(outer_ + slice.index * Outer<T>::kScratch);
    const Range units = share(slice, gates);
    const OuterProduct<T> none{}, dw_ih{x, a_.i, a_.dw_ih},
        dw_hh{h_prev, a_.p, a_.dw_hh, a_.noise.dropout, a_.b};
    if (Cell::kAdditive && !normalises()) {
      outer.add(g.dgx, gates, units, rows, {dw_ih, dw_hh});
    } else {
      outer.add(g.dgx, gates, units, rows, {dw_ih, none});
      outer.add(products(g), gates, units, rows, {dw_hh, none});
    }
    if (!normalises()) {
      add_rows(g.dgx, gates, units, rows, a_.db_ih);
      add_rows(g.dgh, gates, units, rows, a_.db_hh);
    }
    if (a_.w_hr) {
      const OuterProduct<T> dw_hr{a_.m + first * a_.h, a_.h, a_.dw_hr};
      outer.add(g.dh, a_.p, share(slice, a_.p), rows, {dw_hr, none});
    }
  }

  // For some rows of [T*B]; 0 where nothing was computed.
  void multiply_dx(const Slice& slice, const T* dgx, Range rows) const {
    T* dx = a_.dx + rows.begin * a_.i;
    const auto wanted = [&](int64_t r) { return computed_[rows.begin + r]; };
    const auto fetch = [](int64_t, int64_t) {};
    const auto finish = [&](const Tile& tile, const V* sum) {
      for (int i = 0; i < tile.rows; ++i) {
        for (int j = 0; j < tile.blocks; ++j) {
          const Place p = place<kLanes<T>>(tile.row + i, tile.block + j, a_.i);
          frnn::store(dx + p.offset, wanted(p.row) ? *sum : V{}, p.n);
          ++sum;
        }
      }
    };
    const int64_t gates = kGates * a_.h;
    product<1, T>(dgx, gates, {0, rows.size()}, gates, packed(w_ih_, gates),
                  share(slice, blocks_of<T>(a_.i)), false, wanted, fetch, finish);
  }

  // sum [columns] += the sum over rows of a [.., columns], for some of the columns.
  static void add_rows(const T* a, int64_t columns, Range some, const Rows& rows, T* sum) {
    if (sum == nullptr) return;
    for (int64_t j = some.begin; j < some.end; j += kLanes<T>) {
      const int n = static_cast<int>(min(kLanes<T>, some.end - j));
      V total = frnn::load<V>(sum + j, n);
      for (int64_t i = 0; i < rows.count; ++i) total += frnn::load<V>(a + rows[i] * columns + j, n);
      frnn::store(sum + j, total, n);
    }
  }

  const frnn::cpu::BackwardArgs<T>& a_;
  const frnn::cpu::Plan plan_;
  const frnn::Timeline<T> timeline_;
  const Computed computed_;
  const Steps steps_;
  const Statistics<T> of_hh_, of_c_;  // of a step
  const Pairs<T> outputs_;            // .. the gradients of the gate that h takes, and of c's hat
  const int64_t chunk_;               // steps of a chunk
  T* w_hh_ = nullptr;                 // packed
  T* w_hr_ = nullptr;                 // packed
  T* w_ih_ = nullptr;                 // packed
  StepGradients<T> gradients_ = {};   // of two chunks, which take turns
  T* products_ = nullptr;  // likewise the gradients of W_hh h: dgh, if it is not normalised
  T* dm_ = nullptr;        // of a step, the cell's h, where c is normalised before a projection
  T* outer_ = nullptr;     // scratch of each slice
  int* names_ = nullptr;   // of a chunk's computed rows, by each slice
};
