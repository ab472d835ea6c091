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
  static constexpr int kGates = Cell::kGates, kLate = frnn::kLateGates<Cell>,
                       kEarly = kGates - kLate;
  // Rows whose dx is made at a time on tiles: the sums of a piece stay in the cache.
  static constexpr int64_t kRowsOfDx = 32;

 public:
  static void run(const frnn::cpu::BackwardArgs<T>& args, const frnn::cpu::Pool& pool) {
    const auto plan = plan_of<Cell, T>(args, pool.threads);
    Carver measure(nullptr);
    Backward(args, plan, measure);
    Carver carver(frnn::cpu::workspace(measure.used()));
    Backward backward(args, plan, carver);
    run_slices(backward, plan, pool);
  }

  // One thread's part: `each` visits its slices, `meet` waits for all the others.
  template <class Each, class Meet>
  void work(const Each& each, const Meet& meet) {
    [[maybe_unused]] const TileScope scope(tiles_);
    each([&](int i) { pack(slice(i)); });
    each([&](int i) { start(slice(i)); });
    meet();
    for (int64_t s = a_.t - 1; a_.t > 0 && s >= -1; --s) {
      each([&](int i) { gather(slice(i), s); });
      if (s < 0) break;
      if (tiles_ && a_.w_hr) {
        each([&](int i) { split_h(slice(i), s); });
      } else if (tiles_ && !normalises()) {
        each([&](int i) { split_gates(slice(i), s); });
      }
      // What of a step's norms comes next reads what the same slice wrote.
      if (plan_.by_units && (a_.w_hr || !normalises())) meet();
      if constexpr (kLate > 0) {
        each([&](int i) { run_late(slice(i), s); });
        if (plan_.by_units) meet();
      }
      if (a_.w_hr) {
        each([&](int i) { run_cells(slice(i), s); });
        if (tiles_ && !normalises()) each([&](int i) { split_gates(slice(i), s); });
        if (plan_.by_units && !normalises()) meet();
      }
      if (normalises()) {
        if (a_.norm.gain_c) {
          each([&](int i) { gather_outputs(slice(i), s); });
          if (plan_.by_units) meet();
          each([&](int i) { run_gates(slice(i), s); });
        } else {
          each([&](int i) { describe_products(slice(i), s); });
        }
        if (plan_.by_units) meet();
        each([&](int i) { unnormalise_products(slice(i), s); });
        if (tiles_) each([&](int i) { split_gates(slice(i), s); });
        if (plan_.by_units) meet();
      }
      if (s % chunk_ != 0) continue;
      if (!plan_.by_units) meet();
      each([&](int i) { multiply(slice(i), s); });
    }
  }

 private:
  Backward(const frnn::cpu::BackwardArgs<T>& args, const frnn::cpu::Plan& plan, Carver& carver)
      : a_(args),
        plan_(plan),
        timeline_(args),
        computed_(args, carver),
        steps_(args, &args.noise, args.norm.gain_c != nullptr, args.dreset),
        of_products_{{normalises() ? a_.b : 0, a_.h, plan.slices, carver},
                     {normalises() ? a_.b : 0, a_.h, plan.slices, carver}},
        of_c_(a_.norm.gain_c ? a_.b : 0, a_.h, plan.slices, carver),
        outputs_(a_.norm.gain_c ? a_.b : 0, a_.h, carver),
        tiles_(on_tiles<Cell, T>(a_)),
        depth_(tiles_ ? kTileChunk : Outer<T>::kDepth),
        chunk_(a_.b < depth_ ? depth_ / (a_.b > 0 ? a_.b : 1) : 1) {
    const int64_t gates = kGates * a_.h;
    const int64_t rows = min(a_.t, 2 * chunk_) * a_.b;
    w_hh_ = carver.take<T>(blocks_of<T>(a_.p) * block_size(kGates, a_.h));
    if (a_.w_hr) w_hr_ = carver.take<T>(blocks_of<T>(a_.h) * block_size(1, a_.p));
    if (a_.dx) w_ih_ = carver.take<T>(blocks_of<T>(a_.i) * block_size(kGates, a_.h));
    gradients_.dgx = carver.take<T>(rows * gates);
    gradients_.dgh = Cell::kAdditive ? gradients_.dgx : carver.take<T>(rows * gates);
    gradients_.dh = a_.w_hr || a_.norm.gain_c ? carver.take<T>(rows * a_.p) : nullptr;
    products_[0] = normalises() ? carver.take<T>(rows * gates) : gradients_.dgx;
    products_[1] = normalises() ? carver.take<T>(rows * gates) : gradients_.dgh;
    if (kLate > 0) late_ = carver.take<T>(rows * a_.p);
    if (a_.w_hr && a_.norm.gain_c) dm_ = carver.take<T>(a_.b * a_.h);
    if constexpr (kHasTiles && sizeof(T) == 4) {
      if (tiles_) {
        outer_size_ = OuterOfTiles<T>::kScratch;
        static_assert(OuterOfTiles<T>::kScratch >= Outer<T>::kScratch);  // dW_hr needs that
        const int64_t of_h = sums_of_tiles<2>(a_.b, depth(), a_.h),
                      of_x = sums_of_tiles<2>(kRowsOfDx, depth(), a_.i);
        sums_size_ = of_h > of_x ? of_h : of_x;
        sums_ = carver.take<T>(plan.slices * sums_size_);
        split_[0] = carver.take<T>((rows + kRowsBeyond) * row_size<2>(depth()));
        split_[1] = Cell::kAdditive && !normalises()
                        ? split_[0]
                        : carver.take<T>((rows + kRowsBeyond) * row_size<2>(depth()));
        if (a_.w_hr) split_h_ = carver.take<T>((a_.b + kRowsBeyond) * row_size<2>(a_.p));
      }
    }
    outer_ = carver.take<T>(plan.slices * outer_size_);
    names_ = carver.take<int>(plan.slices * chunk_ * a_.b);
  }

  Slice slice(int i) const { return make_slice(a_, plan_, i); }

  // A slice's share of `units` units in the products, in which all slices meet.
  Range share(const Slice& slice, int64_t units) const {
    return part(units, slice.index, plan_.slices);
  }

  void pack(const Slice& slice) const {
    pack(a_.w_hh, a_.p, kEarly, a_.h, slice.pack_output, w_hh_);
    if (kLate > 0) {
      pack(a_.w_hh + kEarly * a_.h * a_.p, a_.p, kLate, a_.h, slice.pack_output, late_weights());
    }
    if (a_.w_hr) pack(a_.w_hr, a_.h, 1, a_.p, slice.pack_hidden, w_hr_);
    if (a_.dx) pack(a_.w_ih, a_.i, kGates, a_.h, share(slice, blocks_of<T>(a_.i)), w_ih_);
  }

  // Of weights w [gates * k, units], some blocks of units.
  void pack(const T* w, int64_t units, int gates, int64_t k, Range blocks, T* packed) const {
    if constexpr (kHasTiles && sizeof(T) == 4) {
      if (tiles_) return pack_tiles_of_gates(w, gates, k, units, blocks, packed);
    }
    pack_columns(w, units, units, {nullptr, gates * k}, blocks, packed);
  }

  // Numbers of a block of weights with a depth of gates * k, packed.
  int64_t block_size(int gates, int64_t k) const {
    return tiles_ ? tiles_along(gates * blocks_of<T>(k) * kLanes<T>) * kTileNumbers
                  : gates * k * kLanes<T>;
  }

  // The depth of products of gates on tiles: each gate has whole blocks.
  int64_t depth() const { return kGates * blocks_of<T>(a_.h) * kLanes<T>; }

  // Packed, those of the late gates.
  T* late_weights() const { return w_hh_ + blocks_of<T>(a_.p) * kLanes<T> * kEarly * a_.h; }

  // Weights as they are packed without tiles, of some gates.
  Packed<T> packed(const T* w, int gates) const { return {w, gates * a_.h * kLanes<T>}; }

  // The product of gradients a [.., gates * k], or the same rows split, and packed weights.
  template <class Wanted, class Fetch, class Finish>
  void product_of(const Slice& slice, const T* a, const T* split, int gates, int64_t k, Range rows,
                  const T* w, int64_t units, Range blocks, bool backwards, const Wanted& wanted,
                  const Fetch& fetch, const Finish& finish) const {
    if constexpr (kHasTiles && sizeof(T) == 4) {
      if (tiles_) {
        const int64_t depth = gates * blocks_of<T>(k) * kLanes<T>;
        return product_of_tiles<1, 2>(split + rows.begin * row_size<2>(depth), rows, depth, w,
                                      blocks_of<T>(units), blocks, backwards,
                                      sums_ + slice.index * sums_size_, wanted, fetch, finish);
      }
    }
    product<1, T>(a, gates * k, rows, gates * k, Packed<T>{w, block_size(gates, k)}, blocks,
                  backwards, wanted, fetch, finish);
  }

  // Splits the slice's share of a step's gradients for the products of tiles that take them up.
  void split_h(const Slice& slice, int64_t s) const {
    split(slice, s, slice.output, gradients(s).dh, 1, a_.p, split_h_);
  }
  void split_gates(const Slice& slice, int64_t s) const {
    const StepGradients<T> g = gradients(s);
    for (int which = 0; which < (split_[0] == split_[1] ? 1 : 2); ++which) {
      split(slice, s, slice.hidden, dproduct(which, g), kGates, a_.h, halves(which, g));
    }
  }
  void split(const Slice& slice, int64_t s, Range blocks, const T* from, int gates, int64_t units,
             T* to) const {
    if constexpr (kHasTiles && sizeof(T) == 4) {
      const int64_t all = blocks_of<T>(units), size = row_size<2>(gates * all * kLanes<T>);
      for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
        if (!timeline_.computed(s, row)) continue;
        for (int g = 0; g < gates; ++g) {
          each_block<T>(blocks, units, [&]<bool kWhole>(int64_t block) {
            const Place p = place<kLanes<T>, kWhole>(row, block, units);
            const V value = frnn::load<V>(from + (row * gates + g) * units + p.unit, p.n);
            split_block(value, g * all + block, to + row * size);
          });
        }
        // A tile holds two blocks.
        if (gates * all % 2 && blocks.end == all) split_block(V{}, gates * all, to + row * size);
      }
    }
  }

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
    clear(slice, 2 * a_.b, kGates * a_.h, a_.dgains);
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

  // The gradients of the products themselves, W_ih x (0) and W_hh h (1), [B, G*H] of a step or of a
  // chunk's.
  T* dproduct(int which, const StepGradients<T>& g) const {
    return products_[which] + (g.dgx - gradients_.dgx);
  }

  // The same, split.
  T* halves(int which, const StepGradients<T>& g) const {
    if constexpr (kHasTiles && sizeof(T) == 4) {
      const int64_t row = (g.dgx - gradients_.dgx) / (kGates * a_.h);
      return split_[which] + row * row_size<2>(depth());
    }
    return nullptr;
  }

  // What entered the late gates' product, [B, P] of a step or of a chunk's.
  T* entered(const StepGradients<T>& g) const {
    return late_ + (g.dgx - gradients_.dgx) / (kGates * a_.h) * a_.p;
  }

  bool normalises() const { return a_.norm.gain_hh != nullptr; }
  T scale(int which, int64_t r) const { return a_.norm.scale[which * a_.t * a_.b + r]; }

  // Calls f(row, row of [T*B]) for the rows that are computed at step s, and what it returns for
  // the slice's blocks.
  template <class F>
  void each_place(const Slice& slice, int64_t s, const F& f) const {
    for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
      if (!timeline_.computed(s, row)) continue;
      each_block<T>(slice.hidden, a_.h, f(row, timeline_.time(s) * a_.b + row));
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
        return [&, row]<bool kWhole>(int64_t block) {
          const Place p = place<kLanes<T>, kWhole>(row, block, a_.h);
          const V dh = frnn::load<V>(dm + p.offset, p.n);
          const V hat = frnn::load<V>(a_.norm.hat_c + t * plane + p.offset, p.n);
          const V gain = frnn::load<V>(a_.norm.gain_c + p.unit, p.n);
          const V tanh_c = frnn::tanh(V(hat * gain + frnn::load<V>(a_.norm.bias_c + p.unit, p.n)));
          const V d = dh * frnn::load<V>(o + p.offset, p.n) * (1.0f - tanh_c * tanh_c);
          outputs_.at(row, block)[0] = dh * tanh_c;
          outputs_.at(row, block)[1] = d * gain;
          of_c_.put(row, block, sums_of_lanes<T>(d * gain, d * gain * hat));
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
        const bool cut = timeline_.entry(s, row) == frnn::Entry::kReset;
        const bool plain = timeline_.goes_on(s, row) && !cut;
        return [&, row, r, means, scale, plain]<bool kWhole>(int64_t block) {
          const Place p = place<kLanes<T>, kWhole>(row, block, a_.h);
          const V hat = frnn::load<V>(a_.norm.hat_c + r * a_.h + p.unit, p.n);
          const V* output = outputs_.at(row, block);
          const V dc = scale * (output[1] - means.first - hat * means.second);
          const auto finish = [&]<bool kPlain>() {
            const auto cell = steps_.template read_cell<kPlain>(s, p);
            steps_.template finish_gates<kPlain>(s, p, output[0], dc, cell, to);
          };
          if (kWhole && plain) {
            finish.template operator()<true>();
          } else {
            finish.template operator()<false>();
          }
          describe_products<kWhole>(row, r, block, to);
        };
      });
    }
  }

  void describe_products(const Slice& slice, int64_t s) const {
    const StepGradients<T> of = gradients(s);
    each_place(slice, s, [&](int64_t row, int64_t r) {
      return
          [&, row, r]<bool kWhole>(int64_t block) { describe_products<kWhole>(row, r, block, of); };
    });
  }

  // Of gate g of a product at p, for the row r of [T*B]: the hat, the gradient of what its gain
  // makes of it, and its own.
  struct OfProduct {
    V hat, d, of_hat;
  };
  OfProduct of_product(int which, int g, const Place& p, int64_t r,
                       const StepGradients<T>& of) const {
    const int64_t offset = g * a_.h + p.unit;
    const T *gains = which == 0 ? a_.norm.gain_ih : a_.norm.gain_hh,
            *d = (which == 0 ? of.dgx : of.dgh) + p.row * kGates * a_.h;
    const V value = frnn::load<V>(d + offset, p.n);
    return {frnn::load<V>(hats(which, r) + offset, p.n), value,
            value * frnn::load<V>(gains + offset, p.n)};
  }
  const T* hats(int which, int64_t r) const {
    return (which == 0 ? a_.norm.hat_ih : a_.norm.hat_hh) + r * kGates * a_.h;
  }

  // Meanwhile the next row's hats are fetched: that many lines are too many for the product.
  template <bool kWhole>
  void describe_products(int64_t row, int64_t r, int64_t block, const StepGradients<T>& of) const {
    const Place p = place<kLanes<T>, kWhole>(row, block, a_.h);
    for (int which = 0; which < 2; ++which) {
      V sums[2] = {};
      for (int g = 0; g < kGates; ++g) {
        const auto [hat, d, of_hat] = of_product(which, g, p, r, of);
        __builtin_prefetch(hats(which, r + 1) + g * a_.h + p.unit);
        sums[0] += of_hat;
        sums[1] += of_hat * hat;
        add(a_.dgains + ((which * a_.b + row) * kGates + g) * a_.h + p.unit, d * hat, p.n);
      }
      of_products_[which].put(row, block, sums_of_lanes<T>(sums[0], sums[1]));
    }
  }

  // Gate by gate: memory is read in order.
  void unnormalise_products(const Slice& slice, int64_t s) const {
    const StepGradients<T> of = gradients(s);
    for (int which = 0; which < 2; ++which) {
      of_products_[which].means(slice, slice.rows, kGates);
      for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
        if (timeline_.computed(s, row)) unnormalise_product(which, slice, s, row, of);
      }
    }
  }

  __attribute__((noinline)) void unnormalise_product(int which, const Slice& slice, int64_t s,
                                                     int64_t row,
                                                     const StepGradients<T>& of) const {
    const int64_t r = timeline_.time(s) * a_.b + row;
    const auto means = of_products_[which].of(slice, row);
    const T scale = this->scale(which, r);
    T* to = dproduct(which, of) + row * kGates * a_.h;
    for (int g = 0; g < kGates; ++g) {
      each_block<T>(slice.hidden, a_.h, [&]<bool kWhole>(int64_t block) {
        const Place p = place<kLanes<T>, kWhole>(row, block, a_.h);
        const auto [hat, _, of_hat] = of_product(which, g, p, r, of);
        const V d = scale * (of_hat - means.first - hat * means.second);
        frnn::store(to + g * a_.h + p.unit, d, p.n);
      });
    }
  }

  void gather(const Slice& slice, int64_t s) const {
    if (all_of(slice.rows, [&](int64_t row) { return idle(s, row); })) return;
    const auto flows_back = [&](int64_t row) { return steps_.flows_back(s, row); };
    const StepGradients<T> to = gradients(s < 0 ? 0 : s);
    const auto finish = [&](const Tile& tile, const V* sum) { finish_gather(s, tile, sum, to); };
    const StepGradients<T> from = gradients(min(s + 1, a_.t - 1));
    const auto fetch = [&](int64_t row, int64_t block) {
      if (s >= 0 && !a_.w_hr) fetch_step(s, row, block);
    };
    if constexpr (kLate > 0) {
      product<1, T>(dproduct(1, from), kGates * a_.h, slice.rows, kEarly * a_.h,
                    packed(w_hh_, kEarly), slice.output, s % 2, flows_back, fetch, finish);
    } else {
      product_of(slice, dproduct(1, from), halves(1, from), kGates, a_.h, slice.rows, w_hh_, a_.p,
                 slice.output, s % 2, flows_back, fetch, finish);
    }
  }

  void run_late(const Slice& slice, int64_t s) const {
    if (all_of(slice.rows, [&](int64_t row) { return timeline_.idle(s, row); })) return;
    const StepGradients<T> to = gradients(s);
    T* to_late = entered(to);
    const auto computed = [&](int64_t row) { return timeline_.computed(s, row); };
    const auto fetch = [](int64_t, int64_t) {};
    const auto finish = [&](const Tile& tile, const V* sum) {
      finish_factors(s, tile, sum, to, to_late);
    };
    product<1, T>(to.dgx + kEarly * a_.h, kGates * a_.h, slice.rows, kLate * a_.h,
                  packed(late_weights(), kLate), slice.output, s % 2, computed, fetch, finish);
  }

  void run_cells(const Slice& slice, int64_t s) const {
    const auto computed = [&](int64_t row) { return timeline_.computed(s, row); };
    const StepGradients<T> to = gradients(s);
    const auto finish = [&](const Tile& tile, const V* sum) {
      if (dm_) return keep_dm(tile, sum);
      finish_cells(s, tile, sum, to);
    };
    const auto fetch = [&](int64_t row, int64_t block) { fetch_step(s, row, block); };
    product_of(slice, to.dh, split_h_, 1, a_.p, slice.rows, w_hr_, a_.h, slice.hidden, s % 2,
               computed, fetch, finish);
  }

  // Not inlined, like Forward::finish_tile.
  __attribute__((noinline)) void finish_factors(int64_t s, const Tile& tile, const V* sum,
                                                const StepGradients<T>& to, T* entered) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.blocks; ++j, ++sum) {
        const Place p = place<kLanes<T>>(tile.row + i, tile.block + j, a_.p);
        if (timeline_.computed(s, p.row)) steps_.finish_factor(s, p, *sum, to, entered);
      }
    }
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
      const bool cut = timeline_.entry(s, row) == frnn::Entry::kReset;
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
    const Range units = share(slice, gates);
    const StepGradients<T>& g = c.gradients;
    const T* x = a_.x + first * a_.i;
    const T* h_prev = a_.h_prev + first * a_.p;
    add_rows(g.dgx, gates, units, rows, a_.db_ih);
    add_rows(g.dgh, gates, units, rows, a_.db_hh);
    const T *of_x = dproduct(0, g), *of_h = dproduct(1, g);
    if (a_.dx) multiply_dx(slice, of_x, halves(0, g), all);
    const Outer<T> outer(outer_ + slice.index * outer_size_);
    const OuterProduct<T> none{}, dw_ih{x, a_.i, a_.dw_ih},
        dw_hh{h_prev, a_.p, a_.dw_hh, a_.noise.dropout, a_.b};
    if (kLate > 0) {
      const int64_t late = kEarly * a_.h;
      const OuterProduct<T> dw_late{entered(g), a_.p, a_.dw_hh, a_.noise.dropout, a_.b};
      outer.add(of_x, gates, {units.begin, min(units.end, late)}, rows, {dw_ih, dw_hh});
      outer.add(of_x, gates, {units.begin > late ? units.begin : late, units.end}, rows,
                {dw_ih, dw_late});
    } else if (of_x == of_h) {
      add_outer(slice, of_x, halves(0, g), rows, {dw_ih, dw_hh});
    } else {
      add_outer(slice, of_x, halves(0, g), rows, {dw_ih, none});
      add_outer(slice, of_h, halves(1, g), rows, {dw_hh, none});
    }
    if (a_.w_hr) {
      const OuterProduct<T> dw_hr{a_.m + first * a_.h, a_.h, a_.dw_hr};
      outer.add(g.dh, a_.p, share(slice, a_.p), rows, {dw_hr, none});
    }
  }

  // Of the slice's share of the gates' gradients, or of the same rows split.
  void add_outer(const Slice& slice, const T* a, const T* split, const Rows& rows,
                 const OuterProduct<T> (&products)[2]) const {
    T* scratch = outer_ + slice.index * outer_size_;
    const int64_t gates = kGates * a_.h;
    if constexpr (kHasTiles && sizeof(T) == 4) {
      if (tiles_) {
        const Range tiles = share(slice, tiles_along(depth()));
        const OuterOfTiles<T> outer(scratch);
        for (int64_t i = 0; i < rows.count; i += kTileChunk) {
          const Rows some = rows.from(i, min(rows.count - i, kTileChunk));
          outer.add(split, kGates, a_.h, tiles, some, products);
        }
        return;
      }
    }
    Outer<T>(scratch).add(a, gates, share(slice, gates), rows, products);
  }

  // For some rows of [T*B]; 0 where nothing was computed.
  void multiply_dx(const Slice& slice, const T* dgx, const T* split, Range rows) const {
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
    const int64_t most = tiles_ ? kRowsOfDx : rows.size();
    for (int64_t row = 0; row < rows.size(); row += most) {
      product_of(slice, dgx, split, kGates, a_.h, {row, min(rows.size(), row + most)}, w_ih_, a_.i,
                 share(slice, blocks_of<T>(a_.i)), false, wanted, fetch, finish);
    }
  }

  // sum [columns] += the sum over rows of a [.., columns], for some of the columns; a few rows at a
  // time, in order of memory.
  static void add_rows(const T* a, int64_t columns, Range some, const Rows& rows, T* sum) {
    if (sum == nullptr) return;
    constexpr int64_t kFew = 8;
    for (int64_t i = 0; i < rows.count; i += kFew) {
      const int64_t end = min(rows.count, i + kFew);
      for (int64_t j = some.begin; j < some.end; j += kLanes<T>) {
        const int n = static_cast<int>(min(kLanes<T>, some.end - j));
        V total = frnn::load<V>(sum + j, n);
        for (int64_t k = i; k < end; ++k) total += frnn::load<V>(a + rows[k] * columns + j, n);
        frnn::store(sum + j, total, n);
      }
    }
  }

  const frnn::cpu::BackwardArgs<T>& a_;
  const frnn::cpu::Plan plan_;
  const frnn::Timeline<T> timeline_;
  const Computed computed_;
  const Steps steps_;
  const Statistics<T> of_products_[2], of_c_;  // of a step
  const Pairs<T> outputs_;           // .. the gradients of the gate that h takes, and of c's hat
  const bool tiles_;                 // whether products are of tiles
  const int64_t depth_;              // rows of a chunk, about
  const int64_t chunk_;              // .. steps
  T* w_hh_ = nullptr;                // packed
  T* w_hr_ = nullptr;                // packed
  T* w_ih_ = nullptr;                // packed
  StepGradients<T> gradients_ = {};  // of two chunks, which take turns
  T* products_[2] = {};   // likewise of the products: dgx and dgh, if these are not normalised
  T* late_ = nullptr;     // likewise what entered the late gates' product
  T* dm_ = nullptr;       // of a step, the cell's h, where c is normalised before a projection
  T* split_[2] = {};      // likewise products_, split for tiles
  T* split_h_ = nullptr;  // of a step, the gradient of h before a projection
  T* sums_ = nullptr;     // of products of tiles, of each slice
  int64_t sums_size_ = 0;
  T* outer_ = nullptr;  // scratch of each slice
  int64_t outer_size_ = Outer<T>::kScratch;
  int* names_ = nullptr;  // of a chunk's computed rows, by each slice
};
