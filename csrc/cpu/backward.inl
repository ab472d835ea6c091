// SPDX-License-Identifier: Apache-2.0
// The backward recurrence and the products that follow it. Included by recurrence.inl inside an
// anonymous namespace.
//
// The gradients of the gates are only kept for a chunk of steps, in the cache, until the products
// have taken them up: what is then added to the gradients of the weights, dx is complete. On tiles
// they are kept as left factors, [slices][times][ranks] of what is computed if rows are divided.

#if defined(FRNN_TILES)
// Where a step leaves them for tiles, and what else becomes of them. Rows of vectors are as
// UnitsOfTiles.
template <class S>
struct GradientsOfTiles : StepGradients<S> {  // dgx and dgh are rows of vectors, or null
  LeftFactor laid[2], laid_h;  // of the products W_ih x and W_hh h, and of h before a projection
  const Ranks* ranks;          // of rows, or null: they are not laid by the cells
  frnn::Wide<S>* sums[2];      // rows of vectors, or null: those of a row are added up
  StepGradients<S> kept;       // for the caller, or null

  FRNN_FN static int64_t first(int64_t row, int64_t unit, int gates, int64_t h) {
    return row * UnitsOfTiles{gates, h}.size() + unit * gates;
  }
  FRNN_FN static int64_t apart(int64_t) { return 16; }

  template <class Cell, class V>
  FRNN_FN void keep(int64_t row, int64_t unit, int n, int64_t h, const V* of_x,
                    const V* of_h) const {
    keep_one<Cell::kGates>(row, unit, n, h, of_x, this->dgx, sums[0], laid[0]);
    if (!Cell::kAdditive) {
      keep_one<Cell::kGates>(row, unit, n, h, of_h, this->dgh, sums[1], laid[1]);
    }
    for (int g = 0; g < Cell::kGates && kept.dgx; ++g) {
      const int64_t place = (row * Cell::kGates + g) * h + unit;
      frnn::store(kept.dgx + place, of_x[g], n);
      frnn::store(kept.dgh + place, Cell::kAdditive ? of_x[g] : of_h[g], n);
    }
  }

 private:
  template <int kGates, class V>
  FRNN_FN void keep_one(int64_t row, int64_t unit, int n, int64_t h, const V* gradients, S* to,
                        frnn::Wide<S>* sum, const LeftFactor& left) const {
    V values[kGates];  // 0 for units that do not exist
    for (int g = 0; g < kGates; ++g) {
      values[g] =
          n == 16 ? gradients[g] : (V)_mm512_maskz_mov_ps(first_of(n), (__m512)gradients[g]);
    }
    const int64_t begin = first(row, unit, kGates, h);
    for (int g = 0; g < kGates && to; ++g) frnn::store(to + begin + 16 * g, values[g], 16);
    for (int g = 0; g < kGates && sum; ++g) {  // as products take them
      V& of_row = reinterpret_cast<V*>(sum + begin)[g];
      of_row += kParts<S> == 1 ? frnn::widen<V>(frnn::rounded(values[g])) : values[g];
    }
    if (ranks == nullptr) return;
    lay_vectors<S, kGates>(values, left, ranks->rank(row), unit * kGates, unit + 16 >= h);
  }
};
#else
template <class S>
struct GradientsOfTiles;
#endif

template <class Cell, class T, class S>
class Backward {
  using V = Vec<T>;
  using Args = frnn::cpu::BackwardArgs<S>;
  static constexpr bool kRounds = !std::is_same_v<S, T>;   // as in Forward
  using Number = std::conditional_t<kTiles, BFloat16, S>;  // of factors in products of many steps
  using Gradients = std::conditional_t<kTiles, GradientsOfTiles<S>, StepGradients<S>>;
  using Steps = frnn::BackwardSteps<Cell, V, S, T, !kRounds, Gradients>;
  using OuterOf = std::conditional_t<kTiles, OuterOfTiles<S>, Outer<T>>;
  using OfWeights = OuterProduct<S, T>;
  static constexpr int kGates = Cell::kGates, kLate = frnn::kLateGates<Cell>,
                       kEarly = kGates - kLate;
  // Rows of a chunk, about, and those whose dx is made at a time on tiles, where the sums of all
  // columns stay in the cache.
  static constexpr int64_t kDepth = kTiles ? kTileChunk : Outer<T>::kDepth, kRowsOfDx = 128;
  static constexpr int kNames = kTiles ? 3 : 1;  // of a row, see Places

 public:
  static void run(const Args& args, const frnn::cpu::Pool& pool) {
    const auto plan = plan_of<Cell, T>(args, pool.threads);
    Carver measure(nullptr);
    Backward(args, plan, measure);
    Carver carver(frnn::cpu::workspace(measure.used()));
    Backward backward(args, plan, carver);
    for (int i = 0; i < plan.slices; ++i) {
      backward.ranks_.fill(backward.timeline_, backward.slice(i));
    }
    backward.name_units();
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
      if (s >= 0 && (s + 1 == a_.t || (s + 1) % chunk_ == 0)) {
        each([&](int i) { clear_sums(slice(i), s); });
      }
      each([&](int i) { gather(slice(i), s); });
      if (s < 0) break;
      if (a_.w_hr) each([&](int i) { lay_dh(slice(i), s); });
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
        each([&](int i) { lay_products(slice(i), s); });
        if (plan_.by_units) meet();
      }
      if (s % chunk_ != 0) continue;
      if (!plan_.by_units) meet();
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
        steps_on_tiles_(steps_on_tiles<Cell, S>(a_)),
        ranks_(args, plan, kTiles, carver),
        steps_(args, &args.noise, args.norm.gain_c != nullptr, args.dreset),
        of_products_{{normalises() ? a_.b : 0, a_.h, plan.slices, carver},
                     {normalises() ? a_.b : 0, a_.h, plan.slices, carver}},
        of_c_(a_.norm.gain_c ? a_.b : 0, a_.h, plan.slices, carver),
        outputs_(a_.norm.gain_c ? a_.b : 0, a_.h, carver),
        chunk_(a_.b < kDepth ? kDepth / (a_.b > 0 ? a_.b : 1) : 1),
        stride_(Gradients::first(1, 0, kGates, a_.h)) {
    const int64_t gates = kGates * a_.h, rows = min(a_.t, kTiles ? 2 : 2 * chunk_) * a_.b;
    const int64_t size = rows * stride_;
    if (steps_on_tiles_) {
      tiles_hh_ = carver.take<Number>(blocks_of<T>(a_.p) * block_size<Number>(stride_));
      if (a_.w_hr) tiles_hr_ = carver.take<Number>(blocks_of<T>(a_.h) * block_size<Number>(a_.p));
    } else {
      w_hh_ = carver.take<S>(blocks_of<T>(a_.p) * block_size<S>(stride_));
      if (kTiles) units_ = carver.take<int>(stride_);
      if (a_.w_hr) w_hr_ = carver.take<S>(blocks_of<T>(a_.h) * block_size<S>(a_.p));
    }
    if (a_.dx) w_ih_ = carver.take<Number>(blocks_of<T>(a_.i) * block_size<Number>(stride_));
    if (!steps_on_tiles_ || normalises()) {
      gradients_.dgx = carver.take<S>(size);
      gradients_.dgh = Cell::kAdditive ? gradients_.dgx : carver.take<S>(size);
    }
    gradients_.dh = a_.w_hr || a_.norm.gain_c ? carver.take<S>(rows * a_.p) : nullptr;
    products_[0] = normalises() ? carver.take<S>(size) : gradients_.dgx;
    products_[1] = normalises() ? carver.take<S>(size) : gradients_.dgh;
    if (kLate > 0) late_ = carver.take<S>(rows * a_.p);
    if (a_.w_hr && a_.norm.gain_c) dm_ = carver.take<S>(a_.b * a_.h);
    if constexpr (kTiles) {
      const int64_t most = stride_ > a_.p ? stride_ : a_.p, of_units = tiles_along(most);
      factors_size_ = OuterOf::factors((of_units + plan.slices - 1) / plan.slices);
      factors_ = carver.take<Number>(plan.slices * factors_size_);
      outer_ = carver.take<T>(plan.slices * OuterOf::kSums);
      const int64_t wide = a_.h > a_.p ? a_.h : a_.p;
      const int64_t of_h = steps_on_tiles_ ? sums_of_tiles<S>(a_.b, most, wide) : 0,
                    of_x = sums_of_tiles<S>(kRowsOfDx, stride_, a_.i);
      sums_size_ = of_h > of_x ? of_h : of_x;
      sums_ = carver.take<T>(plan.slices * sums_size_);
      for (int i = 0; i < 2; ++i) {
        const int64_t size_of_chunk = laid_size<S>(rows_of_chunk(), stride_);
        laid_[0][i] = carver.take<Number>(size_of_chunk);
        laid_[1][i] = of_one() ? laid_[0][i] : carver.take<Number>(size_of_chunk);
        if (a_.w_hr) laid_h_[i] = carver.take<Number>(laid_size<S>(rows_of_chunk(), a_.p));
      }
      if (a_.db_ih || a_.db_hh) {
        sums_of_rows_[0] = carver.take<T>(2 * a_.b * stride_);
        if (!Cell::kAdditive) sums_of_rows_[1] = carver.take<T>(2 * a_.b * stride_);
      }
    } else {
      outer_ = carver.take<T>(plan.slices * OuterOf::kScratch);
    }
    names_ = carver.take<int>(plan.slices * kNames * rows_of_chunk());
    of_chunk_ = carver.take<T>(vectors() * kLanes<T>);
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
    const Range of_x = share(slice, blocks_of<T>(a_.i));
    if constexpr (kTiles) {
      if (a_.dx) pack_tiles<kGates>(a_.w_ih, a_.i, a_.h, of_x, w_ih_);
      if (steps_on_tiles_) {
        pack_tiles<kGates>(a_.w_hh, a_.p, a_.h, slice.pack_output, tiles_hh_);
        if (a_.w_hr) pack_tiles<1>(a_.w_hr, a_.h, a_.p, slice.pack_hidden, tiles_hr_);
        return;
      }
    } else if (a_.dx) {
      pack(a_.w_ih, a_.i, {nullptr, kGates * a_.h}, of_x, w_ih_);
    }
    if constexpr (!kRounds) {
      pack(a_.w_hh, a_.p, {units_, kEarly * stride_ / kGates}, slice.pack_output, w_hh_);
      if (kLate > 0) {
        pack(a_.w_hh + kEarly * a_.h * a_.p, a_.p, {nullptr, kLate * a_.h}, slice.pack_output,
             late_weights());
      }
      if (a_.w_hr) pack(a_.w_hr, a_.h, {nullptr, a_.p}, slice.pack_hidden, w_hr_);
    }
  }

  // For steps on vectors, whose rows are as those of tiles; what is beyond a gate's last unit meets
  // zeros there.
  void name_units() const {
    for (int64_t k = 0; k < stride_ && units_; k += kLanes<T>) {
      const Range there = UnitsOfTiles{kGates, a_.h}.at(k);
      for (int i = 0; i < kLanes<T>; ++i) {
        units_[k + i] = static_cast<int>(min(there.begin + i, there.end - 1));
      }
    }
  }

  // Of weights w [.., units], some blocks of units.
  static void pack(const S* w, int64_t units, const Rows& rows, Range blocks, S* packed) {
    pack_columns(w, units, units, rows, blocks, packed);
  }
  // .. w [kSome * k, units].
  template <int kSome>
  static void pack_tiles(const S* w, int64_t units, int64_t k, Range blocks, Number* packed) {
    const UnitsOfTiles along{kSome, k};
    const auto load = [&](int64_t row, int64_t column) {
      const Range there = along.at(row - row % 16);
      const int64_t from = there.begin + row % 16;
      return load_half(w + from * units + column, from < there.end ? units - column : 0);
    };
    pack_columns_of_tiles<S>(load, along.size(), {tiles_along(along.size()), row_tiles(units)},
                             blocks, packed);
  }

  // Numbers of a block of weights with a depth of k, packed: those of tiles are in bfloat16.
  template <class N>
  static int64_t block_size(int64_t k) {
    return std::is_same_v<N, BFloat16> ? tiles_along(k) * kTileNumbers<S> : k * kLanes<T>;
  }

  // Packed, those of the late gates.
  S* late_weights() const { return w_hh_ + blocks_of<T>(a_.p) * kLanes<T> * kEarly * a_.h; }

  // The product of rows a [.., k], `stride` apart, and packed weights.
  template <class Wanted, class Fetch, class Finish>
  void on_vectors(const T* a, int64_t stride, Range rows, int64_t k, const T* w, Range blocks,
                  bool backwards, const Wanted& wanted, const Fetch& fetch,
                  const Finish& finish) const {
    product<1, T>(a, stride, rows, k, Packed<T>{w, k * kLanes<T>}, blocks, backwards, wanted, fetch,
                  finish);
  }

  // The product of a left factor, whose rows are ranks, and packed weights of some units; others
  // are only finished.
  template <class Wanted, class Fetch, class Finish>
  void on_tiles(const Slice& slice, const LeftFactor& a, Range rows, Range others, int64_t k,
                const Number* w, int64_t units, Range blocks, bool backwards, const Wanted& wanted,
                const Fetch& fetch, const Finish& finish) const {
    product_of_tiles<1, S>({}, a, rows.begin, rows, others, k, w, blocks_of<T>(units), blocks,
                           backwards, sums_ + slice.index * sums_size_, wanted, fetch, finish);
  }
  // .. the rows of a tile's product.
  int64_t row_at(int64_t i) const { return steps_on_tiles_ ? ranks_.row(i) : i; }

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
    clear_kept(slice);
  }

  // A slice's share of w [units, columns].
  template <class N>
  void clear(const Slice& slice, int64_t units, int64_t columns, N* w) const {
    const Range mine = share(slice, units);
    if (w) __builtin_memset(w + mine.begin * columns, 0, mine.size() * columns * sizeof(N));
  }

  // The chunk of steps that begins at step s.
  struct Chunk {
    int64_t time, steps;  // the first time
    int turn;             // which of two places is its own
  };
  Chunk chunk(int64_t s) const {
    const int64_t steps = min(chunk_, a_.t - s);
    const int64_t time = min(timeline_.time(s), timeline_.time(s + steps - 1));
    return {time, steps, static_cast<int>(s / chunk_ % 2)};
  }

  // Where its rows begin, without tiles.
  int64_t row_of(const Chunk& c) const { return c.turn * chunk_ * a_.b; }

  Gradients gradients(const Slice& slice, int64_t s) const {
    const Chunk c = chunk(s - s % chunk_);
    const int64_t t = timeline_.time(s),
                  row = kTiles ? s % 2 * a_.b : row_of(c) + (t - c.time) * a_.b;
    Gradients g{};
    if (gradients_.dgx) {
      g.dgx = gradients_.dgx + row * stride_;
      g.dgh = gradients_.dgh + row * stride_;
    }
    g.dh = gradients_.dh ? gradients_.dh + row * a_.p : nullptr;
    if constexpr (kTiles) {
      const int64_t before = place_of(slice, c, t, 0);
      const auto from = [&](LeftFactor laid) {
        laid.data += before * laid.row;
        return laid;
      };
      for (int i = 0; i < 2; ++i) g.laid[i] = from(left_factor(laid_[i], c));
      if (a_.w_hr) g.laid_h = from(left_factor(laid_h_, c));
      g.ranks = normalises() ? nullptr : &ranks_;
      for (int i = 0; i < 2; ++i) g.sums[i] = sums_of_rows(i, c);
      if (a_.kept.dgx) {
        g.kept.dgx = a_.kept.dgx + t * a_.b * kGates * a_.h;
        g.kept.dgh = a_.kept.dgh + t * a_.b * kGates * a_.h;
      }
    }
    return g;
  }

  T* sums_of_rows(int which, const Chunk& c) const {
    T* sums = sums_of_rows_[which];
    return sums ? sums + c.turn * a_.b * stride_ : nullptr;
  }

  // The gradients of the products themselves, W_ih x (0) and W_hh h (1), at the place of others.
  S* dproduct(int which, const Gradients& g) const {
    return products_[which] + (g.dgx - gradients_.dgx);
  }

  // ---- Left factors of tiles.

  int64_t rows_of_chunk() const { return min(a_.t, chunk_) * a_.b; }
  LeftFactor left_factor(Number* const (&turns)[2], const Chunk& c) const {
    return laid<S>(turns[c.turn], rows_of_chunk());
  }
  // Where the row of a rank is at a time of a chunk. Ranks that are not computed then are where a
  // later time's are.
  int64_t place_of(const Slice& slice, const Chunk& c, int64_t t, int64_t rank) const {
    const int64_t before = ranks_.before(slice, t) - ranks_.before(slice, c.time);
    return c.steps * slice.rows.begin + before + rank - slice.rows.begin;
  }
  // Slices that have ranks of their own.
  int owners() const { return plan_.by_units ? 1 : plan_.slices; }

  // Lays the gradients of the products of a step where they come after norms.
  void lay_products(const Slice& slice, int64_t s) const {
    if constexpr (kTiles) {
      const Gradients g = gradients(slice, s);
      each_place(slice, s, [&](int64_t row, int64_t) {
        return [&, row]<bool kWhole>(int64_t block) {
          const int64_t unit = block * kLanes<T>, begin = Gradients::first(row, unit, kGates, a_.h);
          for (int which = 0; which < 2; ++which) {
            V values[kGates];
            for (int i = 0; i < kGates; ++i) {
              values[i] = frnn::load<V>(dproduct(which, g) + begin + i * kLanes<T>, kLanes<T>);
            }
            lay_vectors<S, kGates>(values, g.laid[which], ranks_.rank(row), unit * kGates,
                                   !kWhole || unit + kLanes<T> >= a_.h);
          }
        };
      });
    }
  }
  // .. of h before a projection.
  void lay_dh(const Slice& slice, int64_t s) const {
    if constexpr (kTiles) {
      const Gradients g = gradients(slice, s);
      for (int64_t row = slice.rows.begin; row < slice.rows.end; ++row) {
        if (!timeline_.computed(s, row)) continue;
        const S* dh = g.dh + row * a_.p;
        lay_blocks<false>(dh, a_.p, slice.output, g.laid_h, ranks_.rank(row));
        if (a_.kept.dh == nullptr) continue;
        const int64_t begin = slice.output.begin * kLanes<T>, end = slice.output.end * kLanes<T>;
        S* to = a_.kept.dh + (timeline_.time(s) * a_.b + row) * a_.p;
        __builtin_memcpy(to + begin, dh + begin, (min(end, a_.p) - begin) * sizeof(S));
      }
    }
  }

  // The computed rows of a chunk, in order of time, where they are in left factors, and which of
  // them is at each place there, or null if all are where they are.
  struct Places {
    Rows rows, left;
    const int* row_at;
  };
  Places places(const Slice& slice, const Chunk& c) const {
    const int64_t most = rows_of_chunk();
    if (!kTiles) return {computed_.of(rows_of(c), names(slice)), {}, nullptr};
    if (a_.lengths == nullptr && plan_.by_units) {
      return {{nullptr, c.steps * a_.b}, {nullptr, c.steps * a_.b}, nullptr};
    }
    int *rows = names(slice), *left = rows + most, *row_at = left + most;
    int64_t count = 0;
    for (int64_t t = c.time; t < c.time + c.steps; ++t) {
      for (int i = 0; i < owners(); ++i) {
        const Slice owner = this->slice(i);
        const int64_t before = place_of(owner, c, t, 0), end = ranks_.computed(owner, t).end;
        for (int64_t row = owner.rows.begin; row < owner.rows.end; ++row) {
          const int64_t rank = ranks_.rank(row);
          if (rank >= end) continue;
          rows[count] = static_cast<int>((t - c.time) * a_.b + row);
          left[count] = static_cast<int>(before + rank);
          row_at[before + rank] = rows[count];
          ++count;
        }
      }
    }
    return {{rows, count}, {left, count}, row_at};
  }

  // Rows of [T*B], and place for a slice's names of some of them.
  Range rows_of(const Chunk& c) const { return {c.time * a_.b, (c.time + c.steps) * a_.b}; }
  int* names(const Slice& slice) const { return names_ + slice.index * kNames * rows_of_chunk(); }

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
      const S* dm = a_.w_hr ? dm_ : gradients(slice, s).dh;
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
      const Gradients to = gradients(slice, s);
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
    const Gradients of = gradients(slice, s);
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
    const V value = frnn::load<V>((which == 0 ? of.dgx : of.dgh) + gate(p, g), p.n);
    return {frnn::load<V>(hats(which, r) + offset, p.n), value,
            value * frnn::load<V>(gains + offset, p.n)};
  }
  // Where a gate's gradient is at p.
  int64_t gate(const Place& p, int g) const {
    return Gradients::first(p.row, p.unit, kGates, a_.h) + g * Gradients::apart(a_.h);
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
    const Gradients of = gradients(slice, s);
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
    S* to = dproduct(which, of);
    for (int g = 0; g < kGates; ++g) {
      each_block<T>(slice.hidden, a_.h, [&]<bool kWhole>(int64_t block) {
        const Place p = place<kLanes<T>, kWhole>(row, block, a_.h);
        const auto [hat, _, of_hat] = of_product(which, g, p, r, of);
        V d = scale * (of_hat - means.first - hat * means.second);
        if (!kWhole) d *= first_lanes<T>(p.n);
        frnn::store(to + gate(p, g), d, kTiles ? kLanes<T> : p.n);
      });
    }
  }

  void gather(const Slice& slice, int64_t s) const {
    if (all_of(slice.rows, [&](int64_t row) { return idle(s, row); })) return;
    const auto flows_back = [&](int64_t i) { return steps_.flows_back(s, row_at(i)); };
    const Gradients to = gradients(slice, s < 0 ? 0 : s);
    const auto finish = [&](const Tile& tile, const V* sum, auto&... beside) {
      finish_gather(s, tile, sum, to, beside...);
    };
    const Gradients from = gradients(slice, min(s + 1, a_.t - 1));
    const auto fetch = [&](int64_t i, int64_t block) {
      if (s >= 0 && !a_.w_hr) fetch_step(s, row_at(i), block);
    };
    if constexpr (kTiles) {
      if (steps_on_tiles_) {
        const Range after =
            s + 1 < a_.t ? computed_ranks(slice, s + 1) : Range{slice.rows.begin, slice.rows.begin};
        const int64_t end = s < 0 ? after.end : computed_ranks(slice, s).end;
        return on_tiles(slice, from.laid[1], after, {after.end, end}, stride_, tiles_hh_, a_.p,
                        slice.output, s % 2, flows_back, fetch, finish);
      }
    }
    if constexpr (!kRounds) {
      on_vectors(dproduct(1, from), stride_, slice.rows, kEarly * stride_ / kGates, w_hh_,
                 slice.output, s % 2, flows_back, fetch, finish);
    }
  }
  Range computed_ranks(const Slice& slice, int64_t s) const {
    return ranks_.computed(slice, timeline_.time(s));
  }

  void run_late(const Slice& slice, int64_t s) const {
    if (all_of(slice.rows, [&](int64_t row) { return timeline_.idle(s, row); })) return;
    const Gradients to = gradients(slice, s);
    S* to_late = entered(to);
    const auto computed = [&](int64_t row) { return timeline_.computed(s, row); };
    const auto fetch = [](int64_t, int64_t) {};
    const auto finish = [&](const Tile& tile, const V* sum) {
      finish_factors(s, tile, sum, to, to_late);
    };
    on_vectors(to.dgx + kEarly * a_.h, stride_, slice.rows, kLate * a_.h, late_weights(),
               slice.output, s % 2, computed, fetch, finish);
  }

  void run_cells(const Slice& slice, int64_t s) const {
    const auto computed = [&](int64_t i) { return timeline_.computed(s, row_at(i)); };
    const Gradients to = gradients(slice, s);
    const auto finish = [&](const Tile& tile, const V* sum, auto&... beside) {
      if (dm_) return keep_dm(tile, sum);
      finish_cells(s, tile, sum, to, beside...);
    };
    const auto fetch = [&](int64_t i, int64_t block) { fetch_step(s, row_at(i), block); };
    if constexpr (kTiles) {
      if (steps_on_tiles_) {
        return on_tiles(slice, to.laid_h, computed_ranks(slice, s), {}, a_.p, tiles_hr_, a_.h,
                        slice.hidden, s % 2, computed, fetch, finish);
      }
    }
    if constexpr (!kRounds) {
      on_vectors(to.dh, a_.p, slice.rows, a_.p, w_hr_, slice.hidden, s % 2, computed, fetch,
                 finish);
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
        const Place p = place<kLanes<T>>(row_at(tile.row + i), tile.block + j, a_.h);
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
    const auto kind_of = [&](int64_t i) {
      const int64_t row = row_at(i);
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
      const int64_t row = row_at(tile.row + i);
      for (int j = 0; j < tile.blocks; ++j) {
        const Place p = place<kLanes<T>, kPlain>(row, tile.block + j, a_.p);
        const auto cell = steps_.template gathers_cells<kPlain>(s)
                              ? steps_.template read_cell<kPlain>(s, p)
                              : typename Steps::OfCell{};
        steps_.template finish_gather<kPlain>(s, p, *sum++, steps_.template read_h<kPlain>(s, p),
                                              cell, to);
        (beside(), ...);
      }
    }
  }
  template <class... Beside>
  __attribute__((noinline)) void finish_cells(int64_t s, const Tile& tile, const V* dm,
                                              const Gradients& to, Beside&... beside) const {
    for (int i = 0; i < tile.rows; ++i) {
      const int64_t row = row_at(tile.row + i);
      for (int j = 0; j < tile.blocks; ++j) {
        const Place p = place<kLanes<T>>(row, tile.block + j, a_.h);
        const V dh = *dm++;
        if (!timeline_.computed(s, row)) continue;
        steps_.template finish_cell<false>(s, p, dh, steps_.template read_cell<false>(s, p), to);
        (beside(), ...);
      }
    }
  }

  // The products of the chunk of steps that begins at step s.
  void multiply(const Slice& slice, int64_t s) const {
    const Chunk c = chunk(s);
    const Places there = places(slice, c);
    const int64_t first = c.time * a_.b;
    const bool once = Cell::kAdditive && db_ih_ && db_hh_;
    add_rows(slice, c, there, 0, db_ih_);
    if (!once) add_rows(slice, c, there, Cell::kAdditive ? 0 : 1, db_hh_);
    if (once && s == 0) {
      each_vector(slice, [&](int64_t, Range units) {
        __builtin_memcpy(db_hh_ + units.begin, db_ih_ + units.begin, units.size() * sizeof(T));
      });
    }
    if (a_.dx) multiply_dx(slice, c, there);
    const OfWeights none{}, dw_ih{a_.x + first * a_.i, a_.i, dw_ih_};
    OfWeights dw_hh{a_.h_prev + first * a_.p, a_.p, dw_hh_};
    if constexpr (!kRounds) {
      dw_hh.scale = a_.noise.dropout;
      dw_hh.period = a_.b;
    }
    const S* m = a_.w_hr ? a_.m + first * a_.h : nullptr;
    if constexpr (kTiles) {
      const LeftFactor of_x = left_factor(laid_[0], c), of_h = left_factor(laid_[1], c);
      const UnitsOfTiles gates{kGates, a_.h};
      add_outer(slice, of_x, gates, there, {dw_ih, of_one() ? dw_hh : none});
      if (!of_one()) add_outer(slice, of_h, gates, there, {dw_hh, none});
      if (a_.w_hr) {
        add_outer(slice, left_factor(laid_h_, c), {1, a_.p}, there, {{m, a_.h, dw_hr_}, none});
      }
    } else {
      const int64_t gates = kGates * a_.h, late = kEarly * a_.h, row = row_of(c);
      const S *of_x = products_[0] + row * stride_, *of_h = products_[1] + row * stride_;
      const Range mine = share(slice, gates);
      const OuterOf outer(outer_ + slice.index * OuterOf::kScratch);
      if constexpr (kLate > 0) {
        const OfWeights dw_late{late_ + row * a_.p, a_.p, a_.dw_hh, a_.noise.dropout, a_.b};
        outer.add(of_x, gates, {mine.begin, min(mine.end, late)}, there.rows, {dw_ih, dw_hh});
        outer.add(of_x, gates, {mine.begin > late ? mine.begin : late, mine.end}, there.rows,
                  {dw_ih, dw_late});
      } else {
        outer.add(of_x, gates, mine, there.rows, {dw_ih, of_one() ? dw_hh : none});
        if (!of_one()) outer.add(of_h, gates, mine, there.rows, {dw_hh, none});
      }
      if (a_.w_hr) {
        outer.add(gradients_.dh + row * a_.p, a_.p, share(slice, a_.p), there.rows,
                  {{m, a_.h, dw_hr_}, none});
      }
    }
    keep_gradients(slice, c);
  }

  // Of a slice's share of the units of a left factor.
  void add_outer(const Slice& slice, const LeftFactor& a, const UnitsOfTiles& units,
                 const Places& there, const OfWeights (&products)[2]) const {
    const OuterOf outer(factors_ + slice.index * factors_size_,
                        outer_ + slice.index * OuterOf::kSums);
    for (int64_t i = 0; i < there.rows.count; i += kTileChunk) {
      const int64_t n = min(there.rows.count - i, kTileChunk);
      outer.add(a, there.left.from(i, n), units, share(slice, tiles_along(units.size())),
                there.rows.from(i, n), products);
    }
  }

  // For all rows a share of the blocks; or if rows are divided, on tiles, all blocks of the rows
  // that the slice laid.
  void multiply_dx(const Slice& slice, const Chunk& c, const Places& there) const {
    const bool by_rows = kTiles && !plan_.by_units;
    const Range all{0, a_.b}, blocks_of_x{0, blocks_of<T>(a_.i)};
    const Range rows = by_rows ? slice.rows : all;
    const Range blocks = by_rows ? blocks_of_x : share(slice, blocks_of_x.end);
    S* dx = a_.dx + c.time * a_.b * a_.i;
    const auto put = [&](int64_t row, int64_t block, V value) {
      const Place p = place<kLanes<T>>(row, block, a_.i);
      frnn::store(dx + p.offset, value, p.n);
    };
    const auto fetch = [](int64_t, int64_t) {};
    const auto finish = [&](const Tile& tile, const V* sum, auto&...) {
      for (int i = 0; i < tile.rows; ++i) {
        const int64_t row = there.row_at ? there.row_at[tile.row + i] : tile.row + i;
        for (int j = 0; j < tile.blocks; ++j) put(row, tile.block + j, *sum++);
      }
    };
    if constexpr (kTiles) {
      const auto wanted = [](int64_t) { return true; };
      const int64_t begin = place_of(slice, c, c.time, rows.begin);
      const int64_t end = place_of(slice, c, c.time + c.steps, rows.begin);
      for (int64_t row = begin; row < end; row += kRowsOfDx) {
        on_tiles(slice, left_factor(laid_[0], c), {row, min(end, row + kRowsOfDx)}, {}, stride_,
                 w_ih_, a_.i, blocks, false, wanted, fetch, finish);
      }
    } else {
      const auto wanted = [&](int64_t row) { return computed_[c.time * a_.b + row]; };
      on_vectors(products_[0] + row_of(c) * stride_, stride_, {0, c.steps * a_.b}, stride_, w_ih_,
                 blocks, false, wanted, fetch, finish);
    }
    for (int64_t i = 0; i < c.steps && a_.lengths; ++i) {  // 0 where nothing was computed
      for (int64_t row = i * a_.b + rows.begin; row < i * a_.b + rows.end; ++row) {
        if (computed_[c.time * a_.b + row]) continue;
        for (int64_t block = blocks.begin; block < blocks.end; ++block) put(row, block, V{});
      }
    }
  }

  // The gradients of gates are vectors, of whose share of a slice f(vector, its units) is called.
  template <class F>
  void each_vector(const Slice& slice, const F& f) const {
    const Range mine = share(slice, vectors());
    for (int64_t v = mine.begin; v < mine.end; ++v) f(v, units_of(v));
  }
  int64_t vectors() const { return (stride_ + kLanes<T> - 1) / kLanes<T>; }
  Range units_of(int64_t vector) const {
    const int64_t begin = vector * kLanes<T>;
    if constexpr (kTiles) {
      return UnitsOfTiles{kGates, a_.h}.at(begin);
    } else {
      return {begin, min(stride_, begin + kLanes<T>)};
    }
  }
  // sum += the sum over all rows of a chunk's gradients of gates, for a slice's share: of a few
  // rows at a time, in order of memory, then of those, so that long sums stay accurate. On tiles
  // rows are themselves sums over the chunk.
  void add_rows(const Slice& slice, const Chunk& c, const Places& there, int which, T* sum) const {
    constexpr int64_t kFew = 16;
    using N = std::conditional_t<kTiles, T, S>;
    const N* from;
    if constexpr (kTiles) {
      from = sums_of_rows(which, c);
    } else {
      from = (which == 0 ? gradients_.dgx : gradients_.dgh) + row_of(c) * stride_;
    }
    const Rows rows = kTiles ? Rows{nullptr, a_.b} : there.rows;
    if (sum == nullptr || there.rows.count == 0) return;
    for (int64_t i = 0; i < rows.count; i += kFew) {
      const int64_t end = min(rows.count, i + kFew);
      each_vector(slice, [&](int64_t v, Range) {
        const int n = static_cast<int>(min(kLanes<T>, stride_ - v * kLanes<T>));
        V some{};
        for (int64_t k = i; k < end; ++k) {
          some += frnn::load<V>(from + rows[k] * stride_ + v * kLanes<T>, n);
        }
        V* of_chunk = reinterpret_cast<V*>(of_chunk_) + v;
        *of_chunk = i > 0 ? some + *of_chunk : some;
      });
    }
    each_vector(slice, [&](int64_t v, Range units) {
      const V* of_chunk = reinterpret_cast<V*>(of_chunk_) + v;
      add(sum + units.begin, *of_chunk, static_cast<int>(units.size()));
    });
  }

  // A slice's sums of rows of the chunk that ends with step s begin with 0.
  void clear_sums(const Slice& slice, int64_t s) const {
    const Chunk c = chunk(s - s % chunk_);
    const int64_t begin = slice.hidden.begin * kGates * kLanes<T>;
    const int64_t size = slice.hidden.size() * kGates * kLanes<T> * sizeof(T);
    for (int i = 0; i < 2 && kTiles; ++i) {
      T* sums = sums_of_rows(i, c);
      for (int64_t row = slice.rows.begin; row < slice.rows.end && sums; ++row) {
        __builtin_memset(sums + row * stride_ + begin, 0, size);
      }
    }
  }

  // For who asks for them, the gradients that the products of a chunk took up. On tiles the cells
  // store them.
  void keep_gradients(const Slice& slice, const Chunk& c) const {
    const int64_t gates = kGates * a_.h, first = c.time * a_.b;
    if (kTiles || a_.kept.dgx == nullptr) return;
    const Range mine = share(slice, c.steps * a_.b);
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
      keep(gradients_.dgx + (row_of(c) + row) * stride_, gates, a_.kept.dgx);
      keep(gradients_.dgh + (row_of(c) + row) * stride_, gates, a_.kept.dgh);
      keep(gradients_.dh + (row_of(c) + row) * a_.p, a_.p, a_.kept.dh);
    }
  }
  void clear_kept(const Slice& slice) const {
    if (!kTiles || a_.lengths == nullptr || a_.kept.dgx == nullptr) return;
    clear(slice, a_.t * a_.b, kGates * a_.h, a_.kept.dgx);
    clear(slice, a_.t * a_.b, kGates * a_.h, a_.kept.dgh);
    if (a_.w_hr) clear(slice, a_.t * a_.b, a_.p, a_.kept.dh);
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

  const Args& a_;
  const frnn::cpu::Plan plan_;
  const frnn::Timeline<S> timeline_;
  const Computed computed_;
  const bool steps_on_tiles_;  // as in Forward
  const Ranks ranks_;          // of which the rows of left factors are
  const Steps steps_;
  const Statistics<T> of_products_[2], of_c_;  // of a step
  const Pairs<T> outputs_;      // .. the gradients of the gate that h takes, and of c's hat
  const int64_t chunk_;         // steps of a chunk
  const int64_t stride_;        // from row to row of these
  S* w_hh_ = nullptr;           // packed
  S* w_hr_ = nullptr;           // packed
  int* units_ = nullptr;        // along k, of W_hh, if not in order
  Number* tiles_hh_ = nullptr;  // in place of those, for tiles
  Number* tiles_hr_ = nullptr;
  Number* w_ih_ = nullptr;    // packed
  Gradients gradients_ = {};  // of two chunks, or on tiles two steps, which take turns
  S* products_[2] = {};       // likewise of the products: dgx and dgh, if they have no norms
  S* late_ = nullptr;         // likewise what entered the late gates' product
  S* dm_ = nullptr;           // of a step, the cell's h, where c is normalised before a projection
  // Left factors of two chunks, which take turns: the gradients of both products, and of h before a
  // projection.
  Number* laid_[2][2] = {};
  Number* laid_h_[2] = {};
  T* sums_of_rows_[2] = {};  // likewise, of gates' gradients, if they are wanted
  T* sums_ = nullptr;        // of products of tiles, of each slice
  int64_t sums_size_ = 0, factors_size_ = 0;
  Number* factors_ = nullptr;  // scratch of each slice for outer products
  T* outer_ = nullptr;         // likewise
  T* of_chunk_ = nullptr;      // the sums of a chunk's rows
  int* names_ = nullptr;       // of a chunk's computed rows, by each slice, see Places
  // The sums of the weights' gradients: the results themselves, if they are not rounded.
  T *dw_ih_, *dw_hh_, *db_ih_, *db_hh_, *dw_hr_;
};
