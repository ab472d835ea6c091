// SPDX-License-Identifier: Apache-2.0
// The forward recurrence. Included by recurrence.inl inside an anonymous namespace.
//
// The input projection W_ih x is made in chunks of steps, each slice for its own rows and units,
// into a buffer that stays in the cache until the steps of the chunk have used it.

template <class Cell, class T, class S>
class Forward {
  using V = Vec<T>;
  using Args = frnn::cpu::ForwardArgs<S>;
  // What is stored is not what was computed: then there are no variants, and tiles take all
  // products.
  static constexpr bool kRounds = !std::is_same_v<S, T>;
  using Number = std::conditional_t<kTiles, BFloat16, S>;  // of factors in products of many steps
  using Steps = frnn::ForwardSteps<Cell, V, S, T, !kRounds>;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates;
  static constexpr int kLate = frnn::kLateGates<Cell>, kEarly = kGates - kLate;
  // Rows of a chunk of the input projection: enough for W_ih to be read seldom.
  static constexpr int64_t kInputRows = 192;

 public:
  static void run(const Args& args, const frnn::cpu::Pool& pool) {
    const auto plan = plan_of<Cell, T>(args, pool.threads);
    Carver measure(nullptr);
    Forward(args, plan, measure);
    Carver carver(frnn::cpu::workspace(measure.used()));
    Forward forward(args, plan, carver);
    for (int i = 0; i < plan.slices; ++i) forward.ranks_.fill(forward.timeline_, forward.slice(i));
    run_slices(forward, plan, pool);
  }

  // One thread's part: `each` visits its slices, `meet` waits for all the others.
  template <class Each, class Meet>
  void work(const Each& each, const Meet& meet) {
    [[maybe_unused]] const std::conditional_t<kTiles, TileScope, int> scope{};
    each([&](int i) { pack(slice(i)); });
    each([&](int i) { start(slice(i)); });
    meet();
    for (int64_t s = 0; s < a_.t; ++s) {
      if (s % chunk_ == 0) {
        if (kTiles) {
          each([&](int i) { lay_input(slice(i), s); });
          if (plan_.by_units) meet();
        }
        if (!fuses_) each([&](int i) { project_input(slice(i), s); });
        if (normalises() && plan_.by_units) meet();
        if (normalises()) each([&](int i) { take_moments(slice(i), s); });
      }
      each([&](int i) { run_cells(slice(i), s); });
      if (!normalises()) each([&](int i) { lay_outputs(slice(i), s); });
      if (plan_.by_units) meet();
      if constexpr (kLate > 0) {
        each([&](int i) { run_late(slice(i), s); });
        if (plan_.by_units) meet();
      }
      if (normalises()) {
        each([&](int i) { normalise_cells(slice(i), s); });
        if (!a_.norm.gain_c) each([&](int i) { lay_outputs(slice(i), s); });
        if (plan_.by_units) meet();
      }
      if constexpr (frnn::NormalisesState<Cell>) {
        if (a_.norm.gain_c) {
          each([&](int i) { normalise_outputs(slice(i), s); });
          each([&](int i) { lay_outputs(slice(i), s); });
          if (plan_.by_units) meet();
        }
      }
      if (a_.w_hr == nullptr) continue;
      each([&](int i) { project(slice(i), s); });
      each([&](int i) { lay_h(slice(i), s + 1); });
      if (plan_.by_units) meet();
    }
  }

 private:
  Forward(const Args& args, const frnn::cpu::Plan& plan, Carver& carver)
      : a_(args),
        plan_(plan),
        timeline_(args),
        computed_(args, carver),
        steps_on_tiles_(steps_on_tiles<Cell, S>(a_)),
        ranks_(args, plan, steps_on_tiles_, carver),
        steps_(args, carver.take<S>(a_.h_prev ? 0 : 2 * a_.b * a_.p),
               carver.take<T>(a_.h_prev ? 0 : (kStates - 1) * a_.b * a_.h),
               carver.take<S>(a_.w_hr && !a_.m ? a_.b * a_.h : 0), &args.noise,
               carver.take<S>(args.noise.dropout ? 2 * a_.b * a_.p : 0), args.reset),
        chunk_(a_.b < kInputRows ? kInputRows / (a_.b > 0 ? a_.b : 1) : 1),
        packed_(kTiles || a_.t * a_.b >= kPackedRows),
        fuses_(steps_on_tiles_ && Cell::kAdditive && !normalises() && fusing_pays()),
        once_ih_(!kTiles && plan.by_units && a_.t <= chunk_),
        once_hh_(!steps_on_tiles_ && plan.by_units && a_.t == 1 && kLate == 0),
        of_ih_(normalises() ? min(chunk_, a_.t) * a_.b : 0, a_.h, plan.slices, carver),
        of_hh_(normalises() ? a_.b : 0, a_.h, plan.slices, carver),
        of_c_(a_.norm.gain_c ? a_.b : 0, a_.h, plan.slices, carver),
        outputs_(a_.norm.gain_c ? a_.b : 0, a_.h, carver) {
    const int64_t lanes = kLanes<T>, units = blocks_of<T>(a_.h) * lanes;
    const int64_t some = plan.slices * kMostBlocks<kGates> * lanes;  // units of the slices' blocks
    if (!fuses_) gx_ = carver.take<T>(min(chunk_, a_.t) * a_.b * units * kGates);
    if (normalises() || kLate > 0) products_ = carver.take<T>(a_.b * units * kGates);
    if (kLate > 0) late_ = carver.take<T>(a_.b * a_.p);
    if (!packed_) return;
    if constexpr (kTiles) {
      const int64_t gates = kGates * blocks_of<T>(a_.h), rows = min(chunk_, a_.t) * a_.b;
      w_ih_ = carver.take<Number>(gates * tiles_along(a_.i) * kTileNumbers<S>);
      bias_ = carver.take<T>(gates * lanes);
      if (a_.lengths) places_ = carver.take<int>(plan.slices * rows);
      laid_x_size_ = laid_size<S>(rows, a_.i);
      laid_x_ = carver.take<Number>((plan.by_units ? 1 : plan.slices) * laid_x_size_);
      names_ = carver.take<int>(plan.slices * rows);
    } else {
      w_ih_ = carver.take<Number>((once_ih_ ? some : units) * kGates * a_.i);
    }
    if (steps_on_tiles_) {
      const int64_t gates = kGates * blocks_of<T>(a_.h), output = blocks_of<T>(a_.p);
      const int64_t most = a_.h > a_.p ? a_.h : a_.p, wide = gates > output ? gates : output;
      sums_size_ = sums_of_tiles<S>(a_.b, most, wide * lanes);
      sums_ = carver.take<T>(plan.slices * sums_size_);
      for (Number*& laid_h : laid_h_) laid_h = carver.take<Number>(laid_size<S>(a_.b, a_.p));
      if (a_.w_hr) laid_m_ = carver.take<Number>(laid_size<S>(a_.b, a_.h));
      tiles_hh_ = carver.take<Number>(gates * tiles_along(a_.p) * kTileNumbers<S>);
      if (a_.w_hr) tiles_hr_ = carver.take<Number>(output * tiles_along(a_.h) * kTileNumbers<S>);
    } else {
      w_hh_ = carver.take<S>((once_hh_ ? some : units) * kGates * a_.p);
      if (a_.w_hr) w_hr_ = carver.take<S>(blocks_of<T>(a_.p) * lanes * a_.h);
    }
  }

  bool fusing_pays() const {
    const int64_t columns = kGates * blocks_of<T>(a_.h), tiles = tiles_along(a_.i);
    const int64_t bytes = (tiles + tiles_along(a_.p)) * columns * kTileNumbers<S> * 2;
    return tiles <= kTilesAtOnce<S> &&  // W_ih is one piece
           frnn::cpu::fusing_pays(a_.b, kParts<S>, bytes, chunk_);
  }

  Slice slice(int i) const { return make_slice<T>(a_, plan_, i); }

  void pack(const Slice& slice) const {
    if (!packed_) return;
    if constexpr (kTiles) {
      pack_tiles(a_.w_ih, kGates, a_.h, a_.i, slice.pack_hidden, w_ih_);
      for (int64_t block = slice.pack_hidden.begin; block < slice.pack_hidden.end; ++block) {
        for (int g = 0; g < kGates; ++g) {
          const V bias = normalises() ? V{} : input_bias(g, block);
          frnn::store(bias_ + (block * kGates + g) * kLanes<T>, bias);
        }
      }
    } else if (!once_ih_) {
      pack_rows(a_.w_ih, kGates, a_.h, a_.i, slice.pack_hidden, w_ih_);
    }
    if constexpr (kTiles) {
      if (steps_on_tiles_) {
        pack_tiles(a_.w_hh, kGates, a_.h, a_.p, slice.pack_hidden, tiles_hh_);
        if (a_.w_hr) pack_tiles(a_.w_hr, 1, a_.p, a_.h, slice.pack_output, tiles_hr_);
        return;
      }
    }
    if constexpr (!kRounds) {
      if (a_.w_hr) pack_rows(a_.w_hr, 1, a_.p, a_.h, slice.pack_output, w_hr_);
      if (once_hh_) return;
      pack_rows(a_.w_hh, kEarly, a_.h, a_.p, slice.pack_hidden, w_hh_);
      if (kLate > 0) {
        pack_rows(late_weights(a_.w_hh, a_.h), kLate, a_.h, a_.p, slice.pack_hidden,
                  late_weights(w_hh_, blocks_of<T>(a_.h) * kLanes<T>));
      }
    }
  }

  // Where the late gates begin among the rows of W_hh, which are as many a gate as there are units.
  template <class P>
  P* late_weights(P* w, int64_t units) const {
    return w + (kEarly)*units * a_.p;
  }

  // Weights [G*H, k] packed by this slice in its own part of `places`.
  PackedOnce<T> once(const Slice& slice, const T* w, int64_t k, T* places) const {
    T* place = places + slice.index * kMostBlocks<kGates> * kGates * kLanes<T> * k;
    return {w, kGates, a_.h, k, place};
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
    if (a_.t > 0) lay_h(slice, 0);
  }

  // The rows of a chunk's input projection that belong to one slice, [blocks][steps][rows][G][V],
  // in the order in which they are written and read; norms take them row by row, with the blocks
  // last but two.
  struct Input {
    V* data;
    Slice slice;
    int64_t first;             // the time of the chunk's first row
    int64_t of_row, of_block;  // how far apart these are
    int* places;               // of rows, of which only those are there that are computed, or null

    V* at(int64_t t, int64_t row, int64_t block) const {
      int64_t r = (t - first) * slice.rows.size() + row - slice.rows.begin;
      if (places) r = places[r];
      return data + r * of_row + (block - slice.hidden.begin) * of_block;
    }
  };

  // The rows of x that it takes, as left factors: by slices of units together, or each has its own.
  LeftFactor laid_x(const Slice& slice, int64_t steps) const {
    const int64_t size = plan_.by_units ? 0 : laid_x_size_;
    return laid<S>(laid_x_ + slice.index * size, steps * slice.rows.size());
  }
  void lay_input(const Slice& slice, int64_t s0) const {
    if constexpr (kTiles) {
      const int64_t steps = min(chunk_, a_.t - s0);
      const Input to = input(slice, s0);
      const Rows rows = rows_of_x(to, steps);
      const Range mine =
          plan_.by_units ? part(rows.count, slice.index, plan_.slices) : Range{0, rows.count};
      lay_rows(a_.x, a_.i, rows.from(mine.begin, mine.size()), a_.i, laid_x(slice, steps),
               mine.begin);
    }
  }

  // Which these are of all [T*B]: those that are computed, or, for steps that take them up, all in
  // the order of a step's left factor.
  Rows rows_of_x(const Input& to, int64_t steps) const {
    const Range& some = to.slice.rows;
    const int64_t first = to.first * a_.b;
    if (a_.lengths == nullptr && some.size() == a_.b) return {nullptr, steps * a_.b, first};
    int* names = names_ + to.slice.index * min(chunk_, a_.t) * a_.b;
    int* places = to.places;
    int count = 0;
    for (int64_t begin = 0; begin < steps * a_.b; begin += a_.b) {
      for (int64_t i = some.begin; i < some.end; ++i) {
        const int64_t row = begin + (fuses_ ? ranks_.row(i) : i);
        if (places) *places++ = count;
        if (fuses_ || computed_[first + row]) names[count++] = static_cast<int>(row);
      }
    }
    return {names, count, first};
  }

  // The projection of the chunk that begins at step s0; whole chunks precede it.
  Input input(const Slice& slice, int64_t s0) const {
    const int64_t before = slice.hidden.begin * a_.b + slice.rows.begin * slice.hidden.size();
    T* data = fuses_ ? nullptr : gx_ + before * min(chunk_, a_.t) * kGates * kLanes<T>;
    const int64_t s1 = min(s0 + chunk_, a_.t);
    const int64_t first = min(timeline_.time(s0), timeline_.time(s1 - 1));
    const int64_t rows = min(chunk_, a_.t) * slice.rows.size(), blocks = slice.hidden.size();
    int* places = places_ ? places_ + slice.index * min(chunk_, a_.t) * a_.b : nullptr;
    V* there = reinterpret_cast<V*>(data);
    if (normalises()) return {there, slice, first, blocks * kGates, kGates, places};
    return {there, slice, first, kGates, rows * kGates, places};
  }

  void project_input(const Slice& slice, int64_t s0) const {
    const Input to = input(slice, s0);
    const int64_t steps = min(chunk_, a_.t - s0), some = slice.rows.size();
    if constexpr (kTiles) {
      const Rows rows = rows_of_x(to, steps);
      project_on_tiles<kGates, S>(laid_x(slice, steps), rows.count, a_.i, w_ih_, bias_,
                                  blocks_of<T>(a_.h), slice.hidden, reinterpret_cast<T*>(to.data),
                                  to.of_row * kLanes<T>, to.of_block * kLanes<T>);
      for (int64_t i = 0; normalises() && i < rows.count; ++i) {
        const int64_t r = rows[i] - to.first * a_.b;
        for (int64_t block = slice.hidden.begin; block < slice.hidden.end; ++block) {
          const V* gx = to.at(to.first + r / a_.b, r % a_.b, block);
          of_ih_.template describe<kGates>(r, block, gx);
        }
      }
    } else if (some == a_.b) {
      project_rows(to, to.first, {0, steps * a_.b});
    } else {
      for (int64_t t = to.first; t < to.first + steps; ++t) project_rows(to, t, slice.rows);
    }
  }

  // Rows of [T*B], counted from those of a time on.
  void project_rows(const Input& to, int64_t begin, Range rows) const {
    const Slice& slice = to.slice;
    const auto wanted = [&](int64_t r) { return computed_[begin * a_.b + r]; };
    const auto fetch = [](int64_t, int64_t) {};
    const auto finish = [&](const Tile& tile, const V* sum) {
      for (int j = 0; j < tile.blocks; ++j) {
        V bias[kGates] = {};
        for (int g = 0; g < kGates && !normalises(); ++g) bias[g] = input_bias(g, tile.block + j);
        for (int i = 0; i < tile.rows; ++i) {
          const int64_t r = tile.row + i;
          if (!wanted(r)) continue;
          const V* product = sum + (i * tile.blocks + j) * kGates;
          V* gx = to.at(begin + r / a_.b, r % a_.b, tile.block + j);
          for (int g = 0; g < kGates; ++g) gx[g] = product[g] + bias[g];
          if (normalises()) {
            of_ih_.template describe<kGates>((begin - to.first) * a_.b + r, tile.block + j, gx);
          }
        }
      }
    };
    const S* x = a_.x + begin * a_.b * a_.i;
    const auto multiply = [&](const auto& weights) {
      product<kGates, T>(x, a_.i, rows, a_.i, weights, slice.hidden, false, wanted, fetch, finish);
    };
    if (packed_ && once_ih_) {
      multiply(once(slice, a_.w_ih, a_.i, w_ih_));
    } else if (packed_) {
      multiply(Packed<T>{w_ih_, a_.i * kGates * kLanes<T>});
    } else {
      product_unpacked<kGates>(x, a_.i, rows, a_.i, a_.w_ih, a_.h, slice.hidden, wanted, finish);
    }
  }

  bool normalises() const { return !kRounds && a_.norm.gain_hh; }

  // Keeps one over the standard deviation of row r of [T*B] for backward; which: 0, 1, 2 for W_ih
  // x, W_hh h and c. Of all slices with that row the first one does it.
  void keep_scale(const Slice& slice, int which, int64_t r, T scale) const {
    if (a_.norm.scale && slice.hidden.begin == 0) {
      a_.norm.scale[which * a_.t * a_.b + r] = scale;
    }
  }

  // A row r of [T*B], or some of its blocks [blocks][G], is normalised in place and has its gains
  // and more(g, block); `hats`, if any, keeps it without these. Gate by gate, so that memory is
  // written in order.
  template <class More>
  void normalise(V* values, const Range& blocks, Two<T> moments, const T* gains, T* hats, int64_t r,
                 const More& more) const {
    for (int g = 0; g < kGates; ++g) {
      each_block<T>(blocks, a_.h, [&]<bool kWhole>(int64_t block) {
        const Place p = place<kLanes<T>, kWhole>(0, block, a_.h);
        V& value = values[(block - blocks.begin) * kGates + g];
        const V hat = (value - moments.first) * moments.second;
        if (hats) frnn::store(hats + (r * kGates + g) * a_.h + p.unit, hat, p.n);
        value = hat * frnn::load<V>(gains + g * a_.h + p.unit, p.n) + more(g, block);
      });
    }
  }

  // Of W_ih x, in the chunk that begins at step s0.
  void take_moments(const Slice& slice, int64_t s0) const {
    const int64_t steps = min(chunk_, a_.t - s0);
    if (slice.rows.size() == a_.b) return of_ih_.moments(slice, {0, steps * a_.b}, kGates);
    for (int64_t i = 0; i < steps; ++i) {
      of_ih_.moments(slice, {i * a_.b + slice.rows.begin, i * a_.b + slice.rows.end}, kGates);
    }
  }

  // What is added to W_ih x: the biases that only meet there.
  V input_bias(int g, int64_t block) const {
    const Place p = place<kLanes<T>>(0, block, a_.h);
    const V bias = a_.b_ih ? frnn::load<V>(a_.b_ih + g * a_.h + p.unit, p.n) : V{};
    const S* more = Cell::kAdditive ? a_.b_hh : nullptr;
    return more ? bias + frnn::load<V>(more + g * a_.h + p.unit, p.n) : bias;
  }

  // W_hh h of a row and block, as the product of this step left it.
  V* product_at(int64_t row, int64_t block) const {
    return reinterpret_cast<V*>(products_) + (row * blocks_of<T>(a_.h) + block) * kGates;
  }

  // Not inlined, like finish_tile.
  __attribute__((noinline)) void keep_products(int64_t s, const Tile& tile, const V* gh) const {
    for (int i = 0; i < tile.rows; ++i) {
      const int64_t row = ranks_.row(tile.row + i);
      for (int j = 0; j < tile.blocks; ++j, gh += kGates) {
        if (!timeline_.computed(s, row)) continue;
        V* to = product_at(row, tile.block + j);
        for (int g = 0; g < kGates; ++g) to[g] = gh[g];
        of_hh_.template describe<kGates>(row, tile.block + j, gh);
      }
    }
  }

  // The cells, or, where c is normalised, as far as c.
  void normalise_cells(const Slice& slice, int64_t s) const {
    const Input gx = input(slice, s - s % chunk_);
    const Range& blocks = slice.hidden;
    of_hh_.moments(slice, slice.rows, kGates);
    for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
      if (timeline_.idle(s, row)) {
        pad(s, {row, blocks.begin, 1, static_cast<int>(blocks.size())});
        continue;
      }
      if (timeline_.computed(s, row)) {
        const int64_t t = timeline_.time(s), r = t * a_.b + row;
        const auto of_x = of_ih_.of(slice, r - gx.first * a_.b), of_h = of_hh_.of(slice, row);
        keep_scale(slice, 0, r, of_x.second);
        keep_scale(slice, 1, r, of_h.second);
        normalise(gx.at(t, row, blocks.begin), blocks, of_x, a_.norm.gain_ih, a_.norm.hat_ih, r,
                  [&](int g, int64_t block) { return input_bias(g, block); });
        normalise(product_at(row, blocks.begin), blocks, of_h, a_.norm.gain_hh, a_.norm.hat_hh, r,
                  [](int, int64_t) { return V{}; });
      }
      finish_row(s, row, blocks, gx);
    }
  }

  // The cells of a row, whose products are at their places.
  void finish_row(int64_t s, int64_t row, const Range& blocks, const Input& gx) const {
    const int64_t whole =
        timeline_.goes_on(s, row) ? min(blocks.end, a_.h / kLanes<T>) : blocks.begin;
    finish_blocks<true>(s, row, {blocks.begin, whole}, gx);
    finish_blocks<false>(s, row, {whole, blocks.end}, gx);
  }

  template <bool kPlain>
  __attribute__((noinline)) void finish_blocks(int64_t s, int64_t row, Range blocks,
                                               const Input& input) const {
    const int64_t t = timeline_.time(s);
    const bool computed = kPlain || timeline_.computed(s, row);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const Place p = place<kLanes<T>, kPlain>(row, block, a_.h);
      const auto in = steps_.read_cell(s, p);
      typename Steps::Outcome result{};
      if (computed) result = steps_.compute(input.at(t, row, block), product_at(row, block), in);
      steps_.template keep_cell<kPlain>(s, p, in, result);
      if constexpr (frnn::NormalisesState<Cell>) {
        if (a_.norm.gain_c) {
          of_c_.template describe<1>(row, block, &result.out[1]);
          outputs_.at(row, block)[0] = result.saved[Cell::kOutput];
          outputs_.at(row, block)[1] = result.out[1];
          continue;
        }
      }
      steps_.template keep_output<kPlain>(s, p, result.out[0]);
    }
  }

  // From c on.
  void normalise_outputs(const Slice& slice, int64_t s) const {
    const int64_t t = timeline_.time(s);
    of_c_.moments(slice, slice.rows, 1);
    for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
      if (timeline_.idle(s, row)) continue;
      const bool computed = timeline_.computed(s, row), plain = timeline_.goes_on(s, row);
      const int64_t r = t * a_.b + row;
      const auto moments = of_c_.of(slice, row);
      if (computed) keep_scale(slice, 2, r, moments.second);
      each_block<T>(slice.hidden, a_.h, [&]<bool kWhole>(int64_t block) {
        const Place p = place<kLanes<T>, kWhole>(row, block, a_.h);
        V h{};
        if (computed) {
          const V* output = outputs_.at(row, block);
          const V hat = (output[1] - moments.first) * moments.second;
          if (a_.norm.hat_c) frnn::store(a_.norm.hat_c + t * a_.b * a_.h + p.offset, hat, p.n);
          const V gain = frnn::load<V>(a_.norm.gain_c + p.unit, p.n);
          h = output[0] * frnn::tanh(V(hat * gain + frnn::load<V>(a_.norm.bias_c + p.unit, p.n)));
        }
        if (plain) {
          steps_.template keep_output<true>(s, p, h);
        } else {
          steps_.template keep_output<false>(s, p, h);
        }
      });
    }
  }

  void run_cells(const Slice& slice, int64_t s) const {
    if (idle(slice, s)) {
      if (!normalises() && kLate == 0) pad(slice, s);
      return;
    }
    const Input gx = input(slice, s - s % chunk_);
    const auto computed = [&](int64_t row) { return timeline_.computed(s, ranks_.row(row)); };
    const auto fetch = [&](int64_t row, int64_t block) {
      fetch_step(s, ranks_.row(row), block, gx);
    };
    const auto finish = [&](const Tile& tile, const V* gh, auto&... beside) {
      if constexpr (kLate > 0) {
        keep_early(s, tile, gx, gh);
      } else if (normalises()) {
        keep_products(s, tile, gh);
      } else {
        finish_cells(s, tile, gx, gh, beside...);
      }
    };
    if constexpr (kTiles) {
      if (steps_on_tiles_) {
        return on_tiles<kGates>(beginning(slice, s), slice, s, laid<S>(laid_h_[s % 2], a_.b), a_.p,
                                tiles_hh_, a_.h, slice.hidden, computed, fetch, finish);
      }
    }
    if constexpr (!kRounds) {
      const S* h = steps_.product_in(s);
      if (packed_ && once_hh_) {
        product<kGates, T>(h, a_.p, slice.rows, a_.p, once(slice, a_.w_hh, a_.p, w_hh_),
                           slice.hidden, s % 2, computed, fetch, finish);
      } else {
        multiply_states<kEarly>(slice, s, h, a_.w_hh, w_hh_, fetch, finish);
      }
    }
  }

  // The product of a left factor with a depth of k and some blocks of packed weights of some units,
  // for step s; its rows are ranks, and only those that are computed are multiplied.
  template <int kSome, class Wanted, class Fetch, class Finish>
  void on_tiles(const Beginning& beginning, const Slice& slice, int64_t s, const LeftFactor& a,
                int64_t k, const Number* packed, int64_t units, Range blocks, const Wanted& wanted,
                const Fetch& fetch, const Finish& finish) const {
    const Range rows = ranks_.computed(slice, timeline_.time(s));
    product_of_tiles<kSome, S>(beginning, a, rows.begin, rows, {rows.end, slice.rows.end}, k,
                               packed, blocks_of<T>(units), blocks, s % 2,
                               sums_ + slice.index * sums_size_, wanted, fetch, finish);
  }

  // What the product of step s begins with: W_ih x and biases, unless they are there.
  Beginning beginning(const Slice& slice, int64_t s) const {
    if (!fuses_) return {};
    const Input to = input(slice, s - s % chunk_);
    LeftFactor x = laid_x(slice, min(chunk_, a_.t - (s - s % chunk_)));
    x.data += (timeline_.time(s) - to.first) * slice.rows.size() * x.row;
    return {x, w_ih_, tiles_along(a_.i), bias_};
  }

  // What a slice's cells made of step s, as a left factor of the product that takes it.
  void lay_outputs(const Slice& slice, int64_t s) const {
    if (a_.w_hr) {
      lay_states(slice, s, steps_.m_at(s), a_.h, slice.hidden, laid_m_);
    } else {
      lay_h(slice, s + 1);
    }
  }
  // Its share of the h that enters step s.
  void lay_h(const Slice& slice, int64_t s) const {
    if (s < a_.t) lay_states(slice, s, steps_.product_in(s), a_.p, slice.output, laid_h_[s % 2]);
  }
  void lay_states(const Slice& slice, int64_t s, const S* states, int64_t units, Range blocks,
                  Number* to) const {
    if constexpr (kTiles) {
      const LeftFactor left = laid<S>(to, a_.b);
      for (int64_t rank = slice.rows.begin; rank < slice.rows.end && steps_on_tiles_; ++rank) {
        const int64_t row = ranks_.row(rank);
        if (timeline_.computed(s, row))
          lay_blocks<true>(states + row * units, units, blocks, left, rank);
      }
    }
  }

  // The product of some gates' weights, which are also packed, or would be.
  template <int kSome, class Fetch, class Finish>
  void multiply_states(const Slice& slice, int64_t s, const T* h, const T* w, const T* packed,
                       const Fetch& fetch, const Finish& finish) const {
    const auto computed = [&](int64_t row) { return timeline_.computed(s, row); };
    if (packed_) {
      const Packed<T> weights{packed, a_.p * kSome * kLanes<T>};
      product<kSome, T>(h, a_.p, slice.rows, a_.p, weights, slice.hidden, s % 2, computed, fetch,
                        finish);
    } else {
      product_unpacked<kSome>(h, a_.p, slice.rows, a_.p, w, a_.h, slice.hidden, computed, finish);
    }
  }

  // The product of the early gates, and what enters that of the late ones. Not inlined, like
  // finish_tile.
  __attribute__((noinline)) void keep_early(int64_t s, const Tile& tile, const Input& input,
                                            const V* gh) const {
    const int64_t t = timeline_.time(s);
    for (int i = 0; i < tile.rows; ++i) {
      const int64_t row = tile.row + i;
      for (int j = 0; j < tile.blocks; ++j, gh += kEarly) {
        if (!timeline_.computed(s, row)) continue;
        V* to = product_at(row, tile.block + j);
        for (int g = 0; g < kEarly; ++g) to[g] = gh[g];
        const Place p = place<kLanes<T>>(row, tile.block + j, a_.h);
        const V h = frnn::load<V>(steps_.product_in(s) + p.offset, p.n);
        frnn::store(late_ + p.offset, Cell::factor(input.at(t, row, tile.block + j), to) * h, p.n);
      }
    }
  }

  void run_late(const Slice& slice, int64_t s) const {
    if (idle(slice, s)) return pad(slice, s);
    const Input gx = input(slice, s - s % chunk_);
    const auto fetch = [&](int64_t row, int64_t block) { fetch_step(s, row, block, gx); };
    const auto finish = [&](const Tile& tile, const V* gh) {
      for (int i = 0; i < tile.rows; ++i) {
        const int64_t row = tile.row + i;
        if (timeline_.idle(s, row)) {
          pad(s, {row, tile.block, 1, tile.blocks});
          continue;
        }
        for (int k = 0; k < tile.blocks * kLate; ++k) {
          product_at(row, tile.block + k / kLate)[kEarly + k % kLate] =
              gh[i * tile.blocks * kLate + k];
        }
        finish_row(s, row, {tile.block, tile.block + tile.blocks}, gx);
      }
    };
    multiply_states<kLate>(slice, s, late_, late_weights(a_.w_hh, a_.h),
                           late_weights(w_hh_, blocks_of<T>(a_.h) * kLanes<T>), fetch, finish);
  }

  bool idle(const Slice& slice, int64_t s) const {
    return all_of(slice.rows, [&](int64_t row) { return timeline_.idle(s, row); });
  }

  void pad(const Slice& slice, int64_t s) const {
    pad(s, {slice.rows.begin, slice.hidden.begin, static_cast<int>(slice.rows.size()),
            static_cast<int>(slice.hidden.size())});
  }
  void pad(int64_t s, const Tile& tile) const {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.blocks; ++j) {
        steps_.pad(s, place<kLanes<T>>(tile.row + i, tile.block + j, a_.h));
      }
    }
  }

  void project(const Slice& slice, int64_t s) const {
    const auto computed = [&](int64_t row) { return timeline_.computed(s, ranks_.row(row)); };
    const auto fetch = [](int64_t, int64_t) {};
    const auto finish = [&](const Tile& tile, const V* sum, auto&...) {
      for (int i = 0; i < tile.rows; ++i) {
        for (int j = 0; j < tile.blocks; ++j) {
          const Place p = place<kLanes<T>>(ranks_.row(tile.row + i), tile.block + j, a_.p);
          steps_.template finish_output<false>(s, p, *sum++);
        }
      }
    };
    if constexpr (kTiles) {
      if (steps_on_tiles_) {
        return on_tiles<1>({}, slice, s, laid<S>(laid_m_, a_.b), a_.h, tiles_hr_, a_.p,
                           slice.output, computed, fetch, finish);
      }
    }
    if constexpr (!kRounds) {
      const S* m = steps_.m_at(s);
      if (packed_) {
        const Packed<T> weights{w_hr_, a_.h * kLanes<T>};
        product<1, T>(m, a_.h, slice.rows, a_.h, weights, slice.output, s % 2, computed, fetch,
                      finish);
      } else {
        product_unpacked<1>(m, a_.h, slice.rows, a_.h, a_.w_hr, a_.p, slice.output, computed,
                            finish);
      }
    }
  }

  // Prefetches what step() touches and no cache holds: arrays that are read or written once.
  void fetch_step(int64_t s, int64_t row, int64_t block, const Input& input) const {
    if (!timeline_.computed(s, row)) return;
    const int64_t t = timeline_.time(s), plane = a_.b * a_.h;
    const int64_t offset = t * plane + row * a_.h + block * kLanes<T>;
    const V* gx = fuses_ ? nullptr : input.at(t, row, block);
    for (int g = 0; g < kGates && gx; ++g) __builtin_prefetch(gx + g);
    if (!a_.saved) return;
    for (int r = 0; r < Cell::kSaved; ++r) __builtin_prefetch(a_.saved + r * a_.t * plane + offset);
  }

  // The cells after the product. Most of them are plain: whole vectors of a row whose states only
  // go into the next step; knowing that saves a third of the time. What is beside is called after
  // each.
  template <class... Beside>
  void finish_cells(int64_t s, const Tile& tile, const Input& input, const V* gh,
                    Beside&... beside) const {
    const int64_t whole = a_.h / kLanes<T>;  // blocks
    if (timeline_.full() && s + 1 < a_.t && tile.block + tile.blocks <= whole) {
      return finish_tile<true>(s, tile, input, gh, beside...);
    }
    const auto kind_of = [&](int64_t rank) {
      const int64_t row = ranks_.row(rank);
      return timeline_.goes_on(s, row) ? Kind::kPlain
             : timeline_.idle(s, row)  ? Kind::kIdle
                                       : Kind::kOther;
    };
    const auto finish = [&](const Tile& some, Kind kind, int64_t before) {
      const V* sums = gh + before * kGates;
      if (kind == Kind::kPlain) {
        finish_tile<true>(s, some, input, sums, beside...);
      } else if (kind == Kind::kOther) {
        finish_tile<false>(s, some, input, sums, beside...);
      } else {
        for (int i = 0; i < some.rows; ++i) {
          pad(s, {ranks_.row(some.row + i), some.block, 1, some.blocks});
        }
      }
    };
    by_kind(tile, whole, kind_of, finish);
  }

  // Never inlined: the microkernels of all shapes must share one copy (of each Beside), in which
  // the compiler fuses multiplications and additions in one way, for the result not to depend on
  // how rows fall into tiles.
  template <bool kPlain, class... Beside>
  __attribute__((noinline)) void finish_tile(int64_t s, const Tile& tile, const Input& input,
                                             const V* gh, Beside&... beside) const {
    const int64_t t = timeline_.time(s);
    const V nothing[kGates] = {};
    for (int i = 0; i < tile.rows; ++i) {
      const int64_t row = ranks_.row(tile.row + i);
      for (int j = 0; j < tile.blocks; ++j, gh += kGates) {
        const Place p = place<kLanes<T>, kPlain>(row, tile.block + j, a_.h);
        const V* gx = fuses_ ? nothing : input.at(t, row, tile.block + j);
        steps_.template finish_cell<kPlain>(s, p, gx, gh, steps_.read_cell(s, p));
        (beside(), ...);
      }
    }
  }

  const Args& a_;
  const frnn::cpu::Plan plan_;
  const frnn::Timeline<S> timeline_;
  const Computed computed_;
  const bool steps_on_tiles_;  // whether those of a step are on tiles
  const Ranks ranks_;          // .. of which the rows of their products are then
  const Steps steps_;
  const int64_t chunk_;  // steps of a chunk of the input projection
  const bool packed_;    // whether the weights are packed
  const bool fuses_;     // .. and steps have W_ih x in their sums from the beginning
  const bool once_ih_;   // .. not beforehand, since all of them are needed only once
  const bool once_hh_;
  const Statistics<T> of_ih_, of_hh_, of_c_;  // of a chunk's rows, and of a step's
  const Pairs<T> outputs_;                    // of a step, what h takes of the gates, and c
  Number* w_ih_ = nullptr;                    // packed
  T* bias_ = nullptr;                         // on tiles, those of the input projection, likewise
  T* gx_ = nullptr;                           // one chunk
  int* places_ = nullptr;                     // .. of its rows, in each slice, see Input
  T* products_ = nullptr;                     // of a step, if more comes before the cells
  T* late_ = nullptr;                         // of a step, what enters the late gates' product
  S* w_hh_ = nullptr;                         // packed
  S* w_hr_ = nullptr;                         // packed
  Number* tiles_hh_ = nullptr;                // in place of those, for tiles
  Number* tiles_hr_ = nullptr;
  int* names_ = nullptr;      // of a chunk's computed rows, by each slice
  Number* laid_x_ = nullptr;  // left factors of tiles: of a chunk
  Number* laid_h_[2] = {};    // .. of the steps, in turn
  Number* laid_m_ = nullptr;  // .. of a step
  T* sums_ = nullptr;         // of products on tiles, of each slice
  int64_t laid_x_size_ = 0, sums_size_ = 0;
};
