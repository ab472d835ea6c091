// SPDX-License-Identifier: Apache-2.0
// The backward recurrence and the products that follow it. Included by recurrence.inl inside an
// anonymous namespace.
//
// The gradients of the gates are only kept for a chunk of steps, in the cache, until the products
// have taken them up: what is then added to the gradients of the weights, dx is complete.

// Gradients of gates in bfloat16 are left factors as steps leave them.
template <class S>
struct LaidGradients : StepGradients<S> {
  FRNN_FN static int64_t stride(int64_t gates) { return row_size(gates); }
};

template <class Cell, class T, class S>
class Backward {
  using V = Vec<T>;
  using Args = frnn::cpu::BackwardArgs<S>;
  static constexpr bool kRounds = !std::is_same_v<S, T>;   // as in Forward
  static constexpr bool kLays = kTiles && !kRounds;        // left factors are laid after the steps
  using Number = std::conditional_t<kTiles, BFloat16, S>;  // of factors in products of many steps
  using Gradients = std::conditional_t<kRounds, LaidGradients<S>, StepGradients<S>>;
  using Steps = frnn::BackwardSteps<Cell, V, S, T, !kRounds, Gradients>;
  using OuterOf = std::conditional_t<kTiles, OuterOfTiles<S>, Outer<T>>;
  static constexpr int kGates = Cell::kGates, kLate = frnn::kLateGates<Cell>,
                       kEarly = kGates - kLate;
  // Rows of a chunk, about, and those whose dx is made at a time on tiles, where the sums of all
  // columns stay in the cache.
  static constexpr int64_t kDepth = kTiles ? kTileChunk : Outer<T>::kDepth, kRowsOfDx = 128;

 public:
  static void run(const Args& args, const frnn::cpu::Pool& pool) {
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
    [[maybe_unused]] const std::conditional_t<kTiles, TileScope, int> scope{};
    each([&](int i) { pack(slice(i)); });
    each([&](int i) { start(slice(i)); });
    meet();
    for (int64_t s = a_.t - 1; a_.t > 0 && s >= -1; --s) {
      each([&](int i) { gather(slice(i), s); });
      if (s < 0) break;
      // What of a step's norms comes next reads what the same slice wrote.
      if (plan_.by_units && (a_.w_hr || !normalises())) meet();
      if constexpr (kLate > 0) {
        each([&](int i) { run_late(slice(i), s); });
        if (plan_.by_units) meet();
      }
      if (a_.w_hr) {
        each([&](int i) { run_cells(slice(i), s); });
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
        if (plan_.by_units) meet();
      }
      if (s % chunk_ != 0) continue;
      if (!plan_.by_units) meet();
      if constexpr (kLays) {
        each([&](int i) { lay(slice(i), s); });
        meet();
      }
      each([&](int i) { multiply(slice(i), s); });
    }
    if constexpr (kRounds) {
      meet();
      each([&](int i) { round_sums(slice(i)); });
    }
  }

 private:
  Backward(const Args& args, const frnn::cpu::Plan& plan, Carver& carver)
      : a_(args),
        plan_(plan),
        timeline_(args),
        computed_(args, carver),
        steps_(args, &args.noise, args.norm.gain_c != nullptr, args.dreset),
        of_products_{{normalises() ? a_.b : 0, a_.h, plan.slices, carver},
                     {normalises() ? a_.b : 0, a_.h, plan.slices, carver}},
        of_c_(a_.norm.gain_c ? a_.b : 0, a_.h, plan.slices, carver),
        outputs_(a_.norm.gain_c ? a_.b : 0, a_.h, carver),
        chunk_(a_.b < kDepth ? kDepth / (a_.b > 0 ? a_.b : 1) : 1),
        stride_(Gradients::stride(kGates * a_.h)) {
    const int64_t gates = kGates * a_.h, rows = min(a_.t, 2 * chunk_) * a_.b;
    const int64_t size = (rows + (kRounds ? kRowsBeyond : 0)) * stride_;
    w_hh_ = carver.take<S>(blocks_of<T>(a_.p) * block_size<S>(gates));
    if (a_.w_hr) w_hr_ = carver.take<S>(blocks_of<T>(a_.h) * block_size<S>(a_.p));
    if (a_.dx) w_ih_ = carver.take<Number>(blocks_of<T>(a_.i) * block_size<Number>(gates));
    gradients_.dgx = carver.take<S>(size);
    gradients_.dgh = Cell::kAdditive ? gradients_.dgx : carver.take<S>(size);
    gradients_.dh = a_.w_hr || a_.norm.gain_c ? carver.take<S>(rows * a_.p) : nullptr;
    products_[0] = normalises() ? carver.take<S>(size) : gradients_.dgx;
    products_[1] = normalises() ? carver.take<S>(size) : gradients_.dgh;
    if (kLate > 0) late_ = carver.take<S>(rows * a_.p);
    if (a_.w_hr && a_.norm.gain_c) dm_ = carver.take<S>(a_.b * a_.h);
    if constexpr (kTiles) {
      const int64_t most = gates > a_.p ? gates : a_.p, of_units = tiles_along(most);
      factors_size_ = OuterOf::factors((of_units + plan.slices - 1) / plan.slices);
      factors_ = carver.take<Number>(plan.slices * factors_size_);
      outer_ = carver.take<T>(plan.slices * OuterOf::kSums);
      const int64_t wide = a_.h > a_.p ? a_.h : a_.p;
      const int64_t of_h = kRounds ? sums_of_tiles<S>(a_.b, most, wide) : 0,
                    of_x = sums_of_tiles<S>(kRowsOfDx, gates, a_.i);
      sums_size_ = of_h > of_x ? of_h : of_x;
      sums_ = carver.take<T>(plan.slices * sums_size_);
      const int64_t some = min(a_.t, chunk_) * a_.b;
      if (kLays) laid_[0] = carver.take<Number>(laid_size<S>(some, gates));
      if (kLays) laid_[1] = of_one() ? laid_[0] : carver.take<Number>(laid_size<S>(some, gates));
      laid_h_size_ = a_.w_hr ? laid_size<S>(kRounds ? a_.b : some, a_.p) : 0;
      laid_h_ = carver.take<Number>((kRounds ? plan.slices : 1) * laid_h_size_);
    } else {
      outer_ = carver.take<T>(plan.slices * OuterOf::kScratch);
    }
    names_ = carver.take<int>(plan.slices * chunk_ * a_.b);
    of_chunk_ = carver.take<T>(gates);
    const auto sum_of = [&](S* result, int64_t count) {
      if constexpr (kRounds) {
        return result ? carver.take<T>(count) : nullptr;
      } else {
        return result;
      }
    };
    dw_ih_ = sum_of(a_.dw_ih, gates * a_.i);
    dw_hh_ = sum_of(a_.dw_hh, gates * a_.p);
    db_ih_ = sum_of(a_.db_ih, gates);
    db_hh_ = sum_of(a_.db_hh, gates);
    dw_hr_ = sum_of(a_.w_hr ? a_.dw_hr : nullptr, a_.p * a_.h);
  }

  Slice slice(int i) const { return make_slice<T>(a_, plan_, i); }

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
  template <class N>
  void pack(const S* w, int64_t units, int gates, int64_t k, Range blocks, N* packed) const {
    const int64_t rows = gates * k;
    if constexpr (std::is_same_v<N, BFloat16>) {
      const auto load = [&](int64_t row, int64_t column) {
        return load_half(w + row * units + column, units - column);
      };
      pack_columns_of_tiles<S>(load, rows, {tiles_along(rows), row_tiles(units)}, blocks, packed);
    } else {
      pack_columns(w, units, units, Rows{nullptr, rows}, blocks, packed);
    }
  }

  // Numbers of a block of weights with a depth of k, packed: those of tiles are in bfloat16.
  template <class N>
  static int64_t block_size(int64_t k) {
    return std::is_same_v<N, BFloat16> ? tiles_along(k) * kTileNumbers<S> : k * kLanes<T>;
  }

  // Packed, those of the late gates.
  S* late_weights() const { return w_hh_ + blocks_of<T>(a_.p) * kLanes<T> * kEarly * a_.h; }

  // Weights as they are packed without tiles, of some gates.
  Packed<T> packed(const T* w, int gates) const { return {w, gates * a_.h * kLanes<T>}; }

  // The product of rows a [.., k], `stride` apart, or of a left factor, and packed weights.
  template <class Wanted, class Fetch, class Finish>
  void product_of(const Slice&, const T* a, int64_t stride, Range rows, int64_t k, const T* w,
                  int64_t, Range blocks, bool backwards, const Wanted& wanted, const Fetch& fetch,
                  const Finish& finish) const {
    product<1, T>(a, stride, rows, k, Packed<T>{w, block_size<T>(k)}, blocks, backwards, wanted,
                  fetch, finish);
  }
  template <class Wanted, class Fetch, class Finish>
  void product_of(const Slice& slice, const LeftFactor& a, int64_t, Range rows, int64_t k,
                  const BFloat16* w, int64_t units, Range blocks, bool backwards,
                  const Wanted& wanted, const Fetch& fetch, const Finish& finish) const {
    if constexpr (kTiles) {
      product_of_tiles<1, S>({}, a, rows.begin, rows, {}, k, w, blocks_of<T>(units), blocks,
                             backwards, sums_ + slice.index * sums_size_, wanted, fetch, finish);
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
    clear(slice, kGates * a_.h, a_.i, dw_ih_);
    clear(slice, kGates * a_.h, a_.p, dw_hh_);
    clear(slice, kGates * a_.h, 1, db_ih_);
    clear(slice, kGates * a_.h, 1, db_hh_);
    if (a_.w_hr) clear(slice, a_.p, a_.h, dw_hr_);
    clear(slice, 2 * a_.b, kGates * a_.h, a_.dgains);
    clear(slice, 2 * a_.b, a_.h, a_.dnorm_c);
    if (kRounds) clear_tails(slice);
  }

  // What is left of whole tiles beside the gates of a row.
  void clear_tails(const Slice& slice) const {
    const int64_t gates = kGates * a_.h, rows = min(a_.t, 2 * chunk_) * a_.b;
    const int64_t tail = tiles_along(gates) * 32 - gates;
    const Range mine = share(slice, rows);
    for (int64_t row = mine.begin; row < mine.end && tail > 0; ++row) {
      __builtin_memset(gradients_.dgx + row * stride_ + gates, 0, tail * sizeof(S));
      __builtin_memset(gradients_.dgh + row * stride_ + gates, 0, tail * sizeof(S));
    }
  }

  // A slice's share of w [units, columns].
  void clear(const Slice& slice, int64_t units, int64_t columns, T* w) const {
    const Range mine = share(slice, units);
    if (w) __builtin_memset(w + mine.begin * columns, 0, mine.size() * columns * sizeof(T));
  }

  // The chunk of steps that begins at step s: [steps, B, ...] in order of time.
  struct Chunk {
    int64_t time, steps;  // the first time
    Gradients gradients;
  };

  Chunk chunk(int64_t s) const {
    const int64_t steps = min(chunk_, a_.t - s);
    const int64_t time = min(timeline_.time(s), timeline_.time(s + steps - 1));
    return {time, steps, row(gradients_, s / chunk_ % 2 * chunk_ * a_.b)};
  }

  Gradients row(const Gradients& g, int64_t row) const {
    const int64_t gates = row * stride_;
    return {g.dgx + gates, g.dgh + gates, g.dh ? g.dh + row * a_.p : nullptr};
  }

  Gradients gradients(int64_t s) const {
    const Chunk c = chunk(s - s % chunk_);
    return row(c.gradients, (timeline_.time(s) - c.time) * a_.b);
  }

  // The gradients of the products themselves, W_ih x (0) and W_hh h (1), [B, G*H] of a step or of a
  // chunk's.
  S* dproduct(int which, const Gradients& g) const {
    return products_[which] + (g.dgx - gradients_.dgx);
  }

  // Rows of gradients, `stride` apart, as a factor: a left one if they are in bfloat16, or on tiles
  // as they were laid.
  auto factor(S* rows, int64_t stride) const {
    if constexpr (kRounds) {
      return whole_rows(rows, stride);
    } else {
      return rows;
    }
  }
  auto factor(S* rows, int64_t stride, Number* laid_rows, const Chunk& c) const {
    if constexpr (kLays) {
      return laid<S>(laid_rows, c.steps * a_.b);
    } else {
      return factor(rows, stride);
    }
  }

  // Lays a slice's share of the computed rows of a chunk, one after the other, as left factors.
  void lay(const Slice& slice, int64_t s) const {
    if constexpr (kLays) {
      const Chunk c = chunk(s);
      const Rows rows = computed_.of(rows_of(c), names(slice));
      const int64_t gates = kGates * a_.h;
      const Range mine = share(slice, rows.count);
      const auto put = [&](const S* from, int64_t k, Number* to) {
        lay_rows<false>(from, k, rows.from(mine.begin, mine.size()), k, laid<S>(to, c.steps * a_.b),
                        mine.begin);
      };
      put(dproduct(0, c.gradients), gates, laid_[0]);
      if (!of_one()) put(dproduct(1, c.gradients), gates, laid_[1]);
      if (a_.w_hr) put(c.gradients.dh, a_.p, laid_h_);
    }
  }

  // Where a chunk's computed rows are in factor(): all there is of what was laid.
  static Rows rows_of_left(const Rows& rows) { return kLays ? Rows{nullptr, rows.count} : rows; }

  // Rows of [T*B], and place for a slice's names of some of them.
  Range rows_of(const Chunk& c) const { return {c.time * a_.b, (c.time + c.steps) * a_.b}; }
  int* names(const Slice& slice) const { return names_ + slice.index * chunk_ * a_.b; }

  // Whether both products of a step have the same gradients.
  bool of_one() const { return Cell::kAdditive && !normalises(); }

  // What entered the late gates' product, [B, P] of a step or of a chunk's.
  S* entered(const Gradients& g) const { return late_ + (g.dgx - gradients_.dgx) / stride_ * a_.p; }

  bool normalises() const { return !kRounds && a_.norm.gain_hh; }
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
      const S* dm = a_.w_hr ? dm_ : gradients(s).dh;
      const S* o = a_.saved + (Cell::kOutput * a_.t + t) * plane;
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
      const Gradients to = gradients(s);
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
    const Gradients of = gradients(s);
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
  OfProduct of_product(int which, int g, const Place& p, int64_t r, const Gradients& of) const {
    const int64_t offset = g * a_.h + p.unit;
    const T* gains = which == 0 ? a_.norm.gain_ih : a_.norm.gain_hh;
    const S* d = (which == 0 ? of.dgx : of.dgh) + p.row * stride_;
    const V value = frnn::load<V>(d + offset, p.n);
    return {frnn::load<V>(hats(which, r) + offset, p.n), value,
            value * frnn::load<V>(gains + offset, p.n)};
  }
  const T* hats(int which, int64_t r) const {
    return (which == 0 ? a_.norm.hat_ih : a_.norm.hat_hh) + r * kGates * a_.h;
  }

  // Meanwhile the next row's hats are fetched: that many lines are too many for the product.
  template <bool kWhole>
  void describe_products(int64_t row, int64_t r, int64_t block, const Gradients& of) const {
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
    const Gradients of = gradients(s);
    for (int which = 0; which < 2; ++which) {
      of_products_[which].means(slice, slice.rows, kGates);
      for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
        if (timeline_.computed(s, row)) unnormalise_product(which, slice, s, row, of);
      }
    }
  }

  __attribute__((noinline)) void unnormalise_product(int which, const Slice& slice, int64_t s,
                                                     int64_t row, const Gradients& of) const {
    const int64_t r = timeline_.time(s) * a_.b + row;
    const auto means = of_products_[which].of(slice, row);
    const T scale = this->scale(which, r);
    S* to = dproduct(which, of) + row * stride_;
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
    const Gradients to = gradients(s < 0 ? 0 : s);
    const auto finish = [&](const Tile& tile, const V* sum, auto&... beside) {
      finish_gather(s, tile, sum, to, beside...);
    };
    const Gradients from = gradients(min(s + 1, a_.t - 1));
    const auto fetch = [&](int64_t row, int64_t block) {
      if (s >= 0 && !a_.w_hr) fetch_step(s, row, block);
    };
    if constexpr (kLate > 0) {
      product<1, T>(dproduct(1, from), kGates * a_.h, slice.rows, kEarly * a_.h,
                    packed(w_hh_, kEarly), slice.output, s % 2, flows_back, fetch, finish);
    } else {
      product_of(slice, factor(dproduct(1, from), stride_), stride_, slice.rows, kGates * a_.h,
                 w_hh_, a_.p, slice.output, s % 2, flows_back, fetch, finish);
    }
  }

  void run_late(const Slice& slice, int64_t s) const {
    if (all_of(slice.rows, [&](int64_t row) { return timeline_.idle(s, row); })) return;
    const Gradients to = gradients(s);
    S* to_late = entered(to);
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
    const Gradients to = gradients(s);
    const auto finish = [&](const Tile& tile, const V* sum, auto&...) {
      if (dm_) return keep_dm(tile, sum);
      finish_cells(s, tile, sum, to);
    };
    const auto fetch = [&](int64_t row, int64_t block) { fetch_step(s, row, block); };
    if constexpr (kRounds) {
      const LeftFactor dh = laid<S>(laid_h_ + slice.index * laid_h_size_, a_.b);
      const Rows rows{nullptr, slice.rows.size(), slice.rows.begin};
      lay_rows<false>(to.dh, a_.p, rows, a_.p, dh, slice.rows.begin);
      product_of(slice, dh, 0, slice.rows, a_.p, w_hr_, a_.h, slice.hidden, s % 2, computed, fetch,
                 finish);
    } else {
      product_of(slice, to.dh, a_.p, slice.rows, a_.p, w_hr_, a_.h, slice.hidden, s % 2, computed,
                 fetch, finish);
    }
  }

  // Not inlined, like Forward::finish_tile.
  __attribute__((noinline)) void finish_factors(int64_t s, const Tile& tile, const V* sum,
                                                const Gradients& to, S* entered) const {
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
  template <class... Beside>
  void finish_gather(int64_t s, const Tile& tile, const V* sum, const Gradients& to,
                     Beside&... beside) const {
    const int64_t whole = a_.w_hr ? 0 : a_.p / kLanes<T>;  // blocks
    if (timeline_.full() && s >= 0 && s + 1 < a_.t && tile.block + tile.blocks <= whole) {
      return finish_gather_tile<true>(s, tile, sum, to, beside...);
    }
    const auto kind_of = [&](int64_t row) {
      const bool cut = timeline_.entry(s, row) == frnn::Entry::kReset;
      return timeline_.goes_on(s, row) && !cut ? Kind::kPlain
             : idle(s, row)                    ? Kind::kIdle
                                               : Kind::kOther;
    };
    const auto finish = [&](const Tile& some, Kind kind, int64_t before) {
      if (kind == Kind::kPlain) finish_gather_tile<true>(s, some, sum + before, to, beside...);
      if (kind == Kind::kOther) finish_gather_tile<false>(s, some, sum + before, to, beside...);
    };
    by_kind(tile, whole, kind_of, finish);
  }

  // Not inlined, like Forward::finish_tile.
  template <bool kPlain, class... Beside>
  __attribute__((noinline)) void finish_gather_tile(int64_t s, const Tile& tile, const V* sum,
                                                    const Gradients& to, Beside&... beside) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.blocks; ++j) {
        const Place p = place<kLanes<T>, kPlain>(tile.row + i, tile.block + j, a_.p);
        const auto cell = steps_.template gathers_cells<kPlain>(s)
                              ? steps_.template read_cell<kPlain>(s, p)
                              : typename Steps::OfCell{};
        steps_.template finish_gather<kPlain>(s, p, *sum++, steps_.template read_h<kPlain>(s, p),
                                              cell, to);
        (beside(), ...);
      }
    }
  }

  __attribute__((noinline)) void finish_cells(int64_t s, const Tile& tile, const V* dm,
                                              const Gradients& to) const {
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
    const Range all = rows_of(c);
    const Rows rows = computed_.of(all, names(slice));
    const Range units = share(slice, gates);
    const Gradients& g = c.gradients;
    const S* x = a_.x + first * a_.i;
    const S* h_prev = a_.h_prev + first * a_.p;
    const bool once = Cell::kAdditive && db_ih_ && db_hh_;
    add_rows(g.dgx, stride_, units, rows, db_ih_);
    if (!once) add_rows(g.dgh, stride_, units, rows, db_hh_);
    if (once && s == 0) {
      __builtin_memcpy(db_hh_ + units.begin, db_ih_ + units.begin, units.size() * sizeof(T));
    }
    const auto of_x = factor(dproduct(0, g), stride_, laid_[0], c);
    const auto of_h = factor(dproduct(1, g), stride_, laid_[1], c);
    if (a_.dx) multiply_dx(slice, of_x, all, rows);
    const OuterProduct<S, T> none{}, dw_ih{x, a_.i, dw_ih_};
    OuterProduct<S, T> dw_hh{h_prev, a_.p, dw_hh_};
    if constexpr (!kRounds) {
      dw_hh.scale = a_.noise.dropout;
      dw_hh.period = a_.b;
    }
    if constexpr (kLate > 0) {
      const int64_t late = kEarly * a_.h;
      const OuterProduct<T> dw_late{entered(g), a_.p, a_.dw_hh, a_.noise.dropout, a_.b};
      const OuterOf outer(outer_ + slice.index * OuterOf::kScratch);
      outer.add(of_x, gates, {units.begin, min(units.end, late)}, rows, {dw_ih, dw_hh});
      outer.add(of_x, gates, {units.begin > late ? units.begin : late, units.end}, rows,
                {dw_ih, dw_late});
    } else if (of_one()) {
      add_outer(slice, of_x, stride_, gates, rows, {dw_ih, dw_hh});
    } else {
      add_outer(slice, of_x, stride_, gates, rows, {dw_ih, none});
      add_outer(slice, of_h, stride_, gates, rows, {dw_hh, none});
    }
    if (a_.w_hr) {
      add_outer(slice, factor(g.dh, a_.p, laid_h_, c), a_.p, a_.p, rows,
                {{a_.m + first * a_.h, a_.h, dw_hr_}, none});
    }
    keep_gradients(slice, c);
  }

  // For who asks for them, the gradients that the products of a chunk took up.
  void keep_gradients(const Slice& slice, const Chunk& c) const {
    const int64_t gates = kGates * a_.h, first = c.time * a_.b;
    const Range mine = share(slice, a_.kept.dgx ? c.steps * a_.b : 0);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const auto keep = [&](const S* from, int64_t n, S* to) {
        if (to == nullptr) return;
        to += (first + row) * n;
        if (computed_[first + row]) {
          __builtin_memcpy(to, from, n * sizeof(S));
        } else {
          __builtin_memset(to, 0, n * sizeof(S));
        }
      };
      keep(c.gradients.dgx + row * stride_, gates, a_.kept.dgx);
      keep(c.gradients.dgh + row * stride_, gates, a_.kept.dgh);
      keep(c.gradients.dh + row * a_.p, a_.p, a_.kept.dh);
    }
  }

  // Rounds a slice's share of the gradients of weights, once they are complete.
  void round_sums(const Slice& slice) const {
    const auto round = [&](const T* sum, int64_t units, int64_t columns, S* to) {
      if (to == nullptr) return;
      const Range mine = share(slice, units);
      for (int64_t i = mine.begin * columns; i < mine.end * columns; i += kLanes<T>) {
        const int n = static_cast<int>(min(kLanes<T>, mine.end * columns - i));
        frnn::store(to + i, frnn::load<V>(sum + i, n), n);
      }
    };
    round(dw_ih_, kGates * a_.h, a_.i, a_.dw_ih);
    round(dw_hh_, kGates * a_.h, a_.p, a_.dw_hh);
    round(db_ih_, kGates * a_.h, 1, a_.db_ih);
    round(db_hh_, kGates * a_.h, 1, a_.db_hh);
    if (a_.w_hr) round(dw_hr_, a_.p, a_.h, a_.dw_hr);
  }

  // Of the slice's share of m units of rows a [.., stride], or of a left factor.
  template <class Factor>
  void add_outer(const Slice& slice, const Factor& a, int64_t stride, int64_t m, const Rows& rows,
                 const OuterProduct<S, T> (&products)[2]) const {
    if constexpr (kTiles) {
      const OuterOf outer(factors_ + slice.index * factors_size_,
                          outer_ + slice.index * OuterOf::kSums);
      for (int64_t i = 0; i < rows.count; i += kTileChunk) {
        const int64_t n = min(rows.count - i, kTileChunk);
        outer.add(a, rows_of_left(rows).from(i, n), m, share(slice, tiles_along(m)),
                  rows.from(i, n), products);
      }
    } else {
      const OuterOf outer(outer_ + slice.index * OuterOf::kScratch);
      outer.add(a, stride, share(slice, m), rows, products);
    }
  }

  // For some rows of [T*B], of which those are named that are computed; 0 where nothing was.
  template <class Factor>
  void multiply_dx(const Slice& slice, const Factor& dgx, Range all, const Rows& rows) const {
    S* dx = a_.dx + all.begin * a_.i;
    const Range blocks = share(slice, blocks_of<T>(a_.i));
    const auto wanted = [&](int64_t r) { return kLays || computed_[all.begin + r]; };
    const auto fetch = [](int64_t, int64_t) {};
    const auto finish = [&](const Tile& tile, const V* sum, auto&...) {
      for (int i = 0; i < tile.rows; ++i) {
        const int64_t row = kLays ? rows[tile.row + i] : tile.row + i;
        for (int j = 0; j < tile.blocks; ++j) {
          const Place p = place<kLanes<T>>(row, tile.block + j, a_.i);
          frnn::store(dx + p.offset, wanted(p.row) ? *sum : V{}, p.n);
          ++sum;
        }
      }
    };
    const int64_t count = kLays ? rows.count : all.size(), most = kTiles ? kRowsOfDx : count;
    for (int64_t row = 0; row < count; row += most) {
      product_of(slice, dgx, stride_, {row, min(count, row + most)}, kGates * a_.h, w_ih_, a_.i,
                 blocks, false, wanted, fetch, finish);
    }
    for (int64_t row = 0; kLays && row < all.size(); ++row) {
      if (computed_[all.begin + row]) continue;
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        const Place p = place<kLanes<T>>(row, block, a_.i);
        frnn::store(dx + p.offset, V{}, p.n);
      }
    }
  }

  // sum [columns] += the sum over rows of a [.., stride], for some of the columns: of a few rows at
  // a time, in order of memory, then of the chunk's, so that long sums stay accurate.
  void add_rows(const S* a, int64_t stride, Range columns, const Rows& rows, T* sum) const {
    constexpr int64_t kFew = 16;
    const auto each_vector = [&](const auto& f) {
      for (int64_t j = columns.begin; j < columns.end; j += kLanes<T>) {
        f(j, static_cast<int>(min(kLanes<T>, columns.end - j)));
      }
    };
    if (sum == nullptr || rows.count == 0) return;
    for (int64_t i = 0; i < rows.count; i += kFew) {
      const int64_t end = min(rows.count, i + kFew);
      each_vector([&](int64_t j, int n) {
        V some{};
        for (int64_t k = i; k < end; ++k) some += frnn::load<V>(a + rows[k] * stride + j, n);
        if (i > 0) some += frnn::load<V>(of_chunk_ + j, n);
        frnn::store(of_chunk_ + j, some, n);
      });
    }
    each_vector([&](int64_t j, int n) { add(sum + j, frnn::load<V>(of_chunk_ + j, n), n); });
  }

  const Args& a_;
  const frnn::cpu::Plan plan_;
  const frnn::Timeline<S> timeline_;
  const Computed computed_;
  const Steps steps_;
  const Statistics<T> of_products_[2], of_c_;  // of a step
  const Pairs<T> outputs_;    // .. the gradients of the gate that h takes, and of c's hat
  const int64_t chunk_;       // steps of a chunk
  const int64_t stride_;      // from row to row of the gates' gradients
  S* w_hh_ = nullptr;         // packed
  S* w_hr_ = nullptr;         // packed
  Number* w_ih_ = nullptr;    // packed
  Gradients gradients_ = {};  // of two chunks, which take turns
  S* products_[2] = {};       // likewise of the products: dgx and dgh, if they have no norms
  S* late_ = nullptr;         // likewise what entered the late gates' product
  S* dm_ = nullptr;           // of a step, the cell's h, where c is normalised before a projection
  // A chunk's gradients as left factors: of the products, and of h before a projection, which if in
  // bfloat16 are those of a step, of each slice.
  Number* laid_[2] = {};
  Number* laid_h_ = nullptr;
  T* sums_ = nullptr;  // of products of tiles, of each slice
  int64_t sums_size_ = 0, laid_h_size_ = 0, factors_size_ = 0;
  Number* factors_ = nullptr;  // scratch of each slice for outer products
  T* outer_ = nullptr;         // likewise
  T* of_chunk_ = nullptr;      // the sums of a chunk's rows
  int* names_ = nullptr;       // of a chunk's computed rows, by each slice
  // The sums of the weights' gradients: the results themselves, if they are not rounded.
  T *dw_ih_, *dw_hh_, *db_ih_, *db_hh_, *dw_hr_;
};
