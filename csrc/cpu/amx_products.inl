// SPDX-License-Identifier: Apache-2.0
// Products of the factors that amx.inl packs. Included by recurrence.inl inside an anonymous
// namespace, in the translation units that are compiled for AMX.

// Tiles along k, and the way from these to the next 16 columns.
struct Tiles {
  const BFloat16* data;
  int64_t stride;
};

// Rows of sums, and the way from row to row in bytes.
struct SumsAt {
  float* data;
  int64_t stride;
};

// Rows at the beginning of a left factor, and tiles of a right one.
struct Factors {
  LeftFactor a;
  Tiles b;
  int64_t tiles;
};

// c = the products of up to two pairs of factors + more, if that is there. It is made in steps, of
// which each multiplies a part of tiles by a part of others.
struct Multiplication {
  Factors of[2];
  SumsAt more, c;
  // The next step.
  int pair = 0;
  int64_t tile = 0;  // along k
  int step = 0;      // of those of a tile

  bool begun() const { return pair > 0 || tile > 0 || step > 0; }
  bool ended() const { return pair == 2; }
};

// Which parts of both factors a step multiplies, and which of them it loads: the others are there
// from the step before.
struct Step {
  int left, right;
  bool loads_left, loads_right;
};
// The smallest products first.
constexpr Step kSteps[] = {{0, 2, true, true},  {0, 1, false, true}, {1, 1, true, false},
                           {1, 0, false, true}, {2, 0, true, false}, {0, 0, true, false}};
template <class S>
constexpr int kStepsOfTile = kParts<S> == 1 ? 1 : 6;

// Goes on by so many steps or to the end, in 16 * kRows rows and 16 * kColumns columns; returns how
// many were too many. Not inlined: vectors are at work where it is called.
template <class S, int kRows, int kColumns>
__attribute__((noinline)) int64_t multiply_tiles(Multiplication& m, int64_t steps) {
  static_assert(kRows * kColumns <= kTilesOfSums && kRows <= kTilesOfRows);
  constexpr int64_t kPiece = kTilesOfPiece<S>;
  constexpr int kAll = kStepsOfTile<S>;
  constexpr bool kFour = kColumns > 2;  // then 5 is of the right factor
  const auto second = [](const SumsAt& sums) {
    return sums.data + (kFour ? 2 * kTileRows : kTileRows * sums.stride / 4);
  };
  memory_barrier();
  if (!m.begun() && m.more.data) {
    _tile_loadd(0, m.more.data, m.more.stride);
    if (kColumns > 1) _tile_loadd(1, m.more.data + kTileRows, m.more.stride);
    if (kRows > 1 || kFour) _tile_loadd(2, second(m.more), m.more.stride);
    if (kRows * kColumns > 3) _tile_loadd(3, second(m.more) + kTileRows, m.more.stride);
  } else if (!m.begun()) {
    _tile_zero(0);
    if (kColumns > 1) _tile_zero(1);
    if (kRows > 1 || kFour) _tile_zero(2);
    if (kRows * kColumns > 3) _tile_zero(3);
  }
  while (!m.ended()) {
    const Factors& of = m.of[m.pair];
    const BFloat16 *const a = of.a.data, *const b = of.b.data;
    const int64_t row = of.a.row, part = of.a.part, piece = of.a.piece, column = of.b.stride;
    const int64_t tiles = of.tiles, stride = row * 2;
    const auto go = [&]<int kStep>(int64_t tile) __attribute__((always_inline)) {
      constexpr Step kThis = kParts<S> == 1 ? Step{0, 0, true, true} : kSteps[kStep];
      const BFloat16* left = a + tile / kPiece * piece + tile % kPiece * kTileDepth;
      const BFloat16* right = b + tile * kTileNumbers<S> + kThis.right * kPartNumbers;
      left += kThis.left * part;
      if (kThis.loads_left) _tile_loadd(4, left, stride);
      if (kThis.loads_left && kRows > 1) _tile_loadd(5, left + kTileRows * row, stride);
      if (kFour || kThis.loads_right) _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (kColumns > 1 && (kFour || kThis.loads_right)) _tile_loadd(7, right + column, 64);
      if (kColumns > 1) _tile_dpbf16ps(1, 4, 7);
      if (kRows > 1) _tile_dpbf16ps(2, 5, 6);
      if (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
      if (kFour) _tile_loadd(5, right + 2 * column, 64);
      if (kFour) _tile_dpbf16ps(2, 4, 5);
      if (kColumns > 3) _tile_loadd(6, right + 3 * column, 64);
      if (kColumns > 3) _tile_dpbf16ps(3, 4, 6);
    };
    if (m.step == 0) {  // whole tiles
      const int64_t end = min(tiles, m.tile + steps / kAll);
      steps -= (end - m.tile) * kAll;
      for (int64_t tile = m.tile; tile < end; ++tile) {
        [&]<int... kStep>(std::integer_sequence<int, kStep...>) __attribute__((always_inline)) {
          (go.template operator()<kStep>(tile), ...);
        }(std::make_integer_sequence<int, kAll>{});
      }
      m.tile = end;
    }
    if (m.tile == tiles) {
      m.tile = 0;
      ++m.pair;
      continue;
    }
    if (steps == 0) return 0;
    if constexpr (kAll > 1) {
      [&]<int... kStep>(std::integer_sequence<int, kStep...>) __attribute__((always_inline)) {
        ((m.step == kStep && (go.template operator()<kStep>(m.tile), true)) || ...);
      }(std::make_integer_sequence<int, kAll>{});
      --steps;
      m.step = (m.step + 1) % kAll;
      m.tile += m.step == 0;
    }
  }
  _tile_stored(0, m.c.data, m.c.stride);
  if (kColumns > 1) _tile_stored(1, m.c.data + kTileRows, m.c.stride);
  if (kRows > 1 || kFour) _tile_stored(2, second(m.c), m.c.stride);
  if (kRows * kColumns > 3) _tile_stored(3, second(m.c) + kTileRows, m.c.stride);
  memory_barrier();
  return steps;
}
// .. of up to two tiles of rows, and as many of columns as there are tiles of sums for.
template <class S>
auto multiply_tiles_of(int64_t rows, int64_t columns) {
  return rows > 1       ? columns > 1 ? multiply_tiles<S, 2, 2> : multiply_tiles<S, 2, 1>
         : columns > 3  ? multiply_tiles<S, 1, 4>
         : columns == 3 ? multiply_tiles<S, 1, 3>
         : columns > 1  ? multiply_tiles<S, 1, 2>
                        : multiply_tiles<S, 1, 1>;
}
template <class S>
void multiply_tiles(int64_t rows, int64_t columns, const LeftFactor& a, const Tiles& b,
                    int64_t tiles, const SumsAt& more, const SumsAt& c) {
  Multiplication m{{{a, b, tiles}, {}}, more, c};
  multiply_tiles_of<S>(rows, columns)(m, tiles * kStepsOfTile<S>);
}

// How steps go with calls: so many with each, and one more with some.
struct Pace {
  int64_t steps = 0, calls = 1, each = 0, rest = 0;

  void set(int64_t some_steps, int64_t some_calls) {
    if (some_steps == steps && some_calls == calls) return;
    *this = {some_steps, some_calls, some_steps / some_calls, some_steps % some_calls};
  }
};

// The products of some rows with all columns of some blocks, which go on while vectors finish the
// sums made before: they are other units of the processor.
template <class S>
class Beside {
 public:
  explicit Beside(Multiplication& next) : next_(next) {}

  // So many tiles of rows and of columns, of which `next` is the first.
  void begin(int64_t rows, int64_t columns) {
    rows_ = rows;
    columns_ = columns;
  }
  // All of it is to be done in so many calls.
  void set_pace(int64_t calls) {
    const int64_t passes = rows_ > 1 ? (columns_ + 1) / 2 : (columns_ + 3) / 4;
    pace_.set(passes * (next_.of[0].tiles + next_.of[1].tiles) * kStepsOfTile<S>, calls);
    due_ = 0;
  }
  void operator()() {
    int64_t steps = pace_.each;
    due_ += pace_.rest;
    if (due_ >= pace_.calls) {
      due_ -= pace_.calls;
      ++steps;
    }
    if (steps > 0) go_on(steps);
  }
  void end() { go_on(int64_t{1} << 40); }

 private:
  void go_on(int64_t steps) {
    const int64_t at_once = rows_ > 1 ? 2 : 4;
    while (columns_ > 0 && steps > 0) {
      steps = multiply_tiles_of<S>(rows_, columns_)(next_, steps);
      if (!next_.ended()) return;
      columns_ -= at_once;
      next_.pair = 0;
      for (Factors& f : next_.of) f.b.data += at_once * f.b.stride;
      next_.c.data += at_once * kTileRows;
      if (next_.more.data) next_.more.data += at_once * kTileRows;
    }
  }

  Multiplication& next_;
  int64_t rows_ = 1, columns_ = 0;  // that are left
  Pace pace_;
  int64_t due_ = 0;
};

// As product(), of rows of a left factor from the given one on, with a depth of k, and packed
// weights of all_blocks blocks, added to what it begins with, if anything. Others are rows that are
// only finished, with any sums. Of some blocks weights stay in the L2 cache for all rows. Scratch
// has place for sums_of_tiles().
template <int kGates, class S, class Wanted, class Fetch, class Finish>
void product_of_tiles(const Beginning& beginning, const LeftFactor& a, int64_t first_row,
                      Range rows, Range others, int64_t k, const BFloat16* packed,
                      int64_t all_blocks, Range blocks, bool backwards, float* scratch,
                      const Wanted& wanted, const Fetch& fetch, const Finish& finish) {
  constexpr int kRows = kTilesOfRows * kTileRows, kBlocks = kGates == 1 ? kTilesOfSums : 1;
  constexpr int64_t kSums = kRows * kBlocks * kGates;
  constexpr int64_t kDeep = kTilesAtOnce<S>;
  const InPieces<S> at{tiles_along(k), all_blocks * kGates};
  const int pieces = static_cast<int>((at.tiles + kDeep - 1) / kDeep);
  const int64_t groups = (blocks.size() + kBlocks - 1) / kBlocks;
  TileScope::set_rows(rows.size());
  // Few rows with one part each have too few steps: all are finished after all products.
  const bool later = kParts<S> == 1 && rows.size() <= kTileRows;
  const int64_t panel =
      rows.size() > kRows ? blocks_of_panel<S>(at.tiles, kBlocks * kGates) : groups;
  const bool keeps = pieces > 1 || later;  // the sums of all, else those of two take turns
  const auto tile_at = [&](int64_t r0, int64_t group) {
    const int64_t block = blocks.begin + kBlocks * (backwards ? groups - 1 - group : group);
    return Tile{r0, block, static_cast<int>(min(kRows, rows.end - r0)),
                static_cast<int>(min(kBlocks, blocks.end - block))};
  };
  Tile before{0, 0, 0, 0};  // whose sums are still to be finished
  const Sums* sums_before = nullptr;
  Multiplication next{};
  Beside<S> beside(next);
  const auto finish_before = [&] {  // while the next product is made
    if (before.rows > 0) {
      beside.set_pace(before.rows * before.blocks);
      finish(before, sums_before, beside);
      before.rows = 0;
    }
    beside.end();
  };
  for (int64_t first_group = 0; first_group < groups; first_group += panel) {
    const int64_t end_group = min(groups, first_group + panel);
    for (int piece = 0; piece < pieces; ++piece) {
      const int64_t first = kDeep * (backwards ? pieces - 1 - piece : piece);
      const bool begins = piece == 0 && beginning.tiles > 0;
      int64_t place = 0;
      next.of[0].tiles = min(kDeep, at.tiles - first);
      next.of[1].tiles = begins ? beginning.tiles : 0;
      for (Factors& of : next.of) of.b.stride = of.tiles * kTileNumbers<S>;
      for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRows) {
        next.of[0].a = a.from<S>(first_row + r0 - rows.begin, first * kTileDepth);
        if (begins) next.of[1].a = beginning.a.from<S>(r0 - rows.begin, 0);
        const Range some{r0, min(rows.end, r0 + kRows)};
        const bool none = all_of(some, [&](int64_t row) { return !wanted(row); });
        for (int64_t i = first_group; i < end_group; ++i, ++place) {
          const Tile tile = tile_at(r0, i);
          const int columns = tile.blocks * kGates;
          const int64_t column = tile.block * kGates;
          for (int row = piece; row < tile.rows; row += pieces) {
            for (int j = 0; j < tile.blocks; ++j) fetch(r0 + row, tile.block + j);
          }
          Sums* sum = reinterpret_cast<Sums*>(scratch) + (keeps ? place : place % 2) * kSums;
          if (sum == sums_before) finish_before();
          next.c = {reinterpret_cast<float*>(sum), columns * 64};
          next.more = piece > 0 ? next.c : SumsAt{};
          next.of[0].b.data = packed + at(first, column);
          if (begins) {
            next.more = {beginning.bias + column * kTileRows, 0};
            next.of[1].b.data = beginning.packed + column * next.of[1].b.stride;
          }
          beside.begin(row_tiles(tile.rows), none ? 0 : columns);
          finish_before();
          if (piece + 1 < pieces || later) continue;
          before = tile;
          sums_before = sum;
        }
      }
    }
  }
  finish_before();
  for (int64_t i = 0; i < groups && later; ++i) {
    before = tile_at(rows.begin, i);
    sums_before = reinterpret_cast<Sums*>(scratch) + i * kSums;
    finish_before();
  }
  for (int64_t row = others.begin; row < others.end; ++row) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      finish(Tile{row, block, 1, 1}, reinterpret_cast<const Sums*>(scratch), beside);
    }
  }
}

// c [kGates][16], of_row numbers from row to row and of_block from block to block, = bias
// [all_blocks][kGates][16] + a product as above, of many rows, which goes straight there.
template <int kGates, class S>
void project_on_tiles(const LeftFactor& a, int64_t rows, int64_t k, const BFloat16* packed,
                      float* bias, int64_t all_blocks, Range blocks, float* c, int64_t of_row,
                      int64_t of_block) {
  constexpr int64_t kRows = kTilesOfRows * kTileRows, kWidth = kGates * kTileRows;
  const InPieces<S> at{tiles_along(k), all_blocks * kGates};
  const int64_t size_of_panel = blocks_of_panel<S>(at.tiles, kGates);
  for (int64_t panel = blocks.begin; panel < blocks.end; panel += size_of_panel) {
    for (int64_t first = 0; first < at.tiles; first += kTilesAtOnce<S>) {
      const int64_t tiles = min(kTilesAtOnce<S>, at.tiles - first);
      const int64_t size = tiles * kTileNumbers<S>;
      for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
        const int64_t n = min(kRows, rows - r0);
        TileScope::set_rows(n);
        const int64_t at_once = kTilesOfSums / row_tiles(n);
        const LeftFactor left = a.from<S>(r0, first * kTileDepth);
        for (int64_t block = panel; block < min(blocks.end, panel + size_of_panel); ++block) {
          const BFloat16* w = packed + at(first, block * kGates);
          float* sums = c + (block - blocks.begin) * of_block + r0 * of_row;
          for (int64_t column = 0; column < kGates; column += at_once) {
            const SumsAt to{sums + column * kTileRows, of_row * 4};
            const SumsAt more{bias + block * kWidth + column * kTileRows, 0};
            multiply_tiles<S>(row_tiles(n), kGates - column, left, {w + column * size, size}, tiles,
                              first > 0 ? to : more, to);
          }
        }
      }
    }
  }
}

// As Outer.
template <class S>
class OuterOfTiles {
  using Product = OuterProduct<S, float>;
  static constexpr int64_t kHeight = kTilesOfRows * kTileRows;
  static constexpr int64_t kColumns = kTilesOfSums / kTilesOfRows * kTileRows;
  // Of N: of two products these take the half of an L2 cache.
  static constexpr int64_t kWidth = 512 / kParts<S> / kColumns * kColumns;
  static constexpr int64_t kPart = kTileChunk, kStride = kParts<S> * kPart + 32;
  // Numbers of packed factors: a tile of units of a, the columns of b.
  static constexpr int64_t kOfA = kHeight * kStride;
  static constexpr int64_t kOfB = kWidth / kTileRows * tiles_along(kTileChunk) * kTileNumbers<S>;

 public:
  // Of the packed factors for so many tiles of units, and of the sums.
  static constexpr int64_t factors(int64_t tiles) { return 2 * kOfB + tiles * kOfA; }
  static constexpr int64_t kSums = 2 * kHeight * kWidth;

  OuterOfTiles(BFloat16* factors, float* sums)
      : sums_{sums, sums + kHeight * kWidth}, b_{factors, factors + kOfB}, a_(factors + 2 * kOfB) {}

  // For some tiles of 32 of the units. Of a left factor these are the rows of_a, of b the others;
  // there are at most kTileChunk.
  void add(const LeftFactor& a, const Rows& of_a, const UnitsOfTiles& units, Range tiles_of_units,
           const Rows& rows, const Product (&products)[2]) const {
    const int64_t tiles = tiles_along(rows.count);
    TileScope::set_rows(kHeight);
    // Rows beyond the last one are those of b that are zeros.
    int64_t places[kTileChunk];
    for (int64_t i = 0; i < tiles * kTileDepth; ++i) {
      places[i] = of_a[min(i, rows.count - 1)] * a.row;
    }
    int64_t most = 0;
    for (const Product& p : products) most = p.c && p.n > most ? p.n : most;
    for (int64_t n0 = 0; n0 < most; n0 += kWidth) {
      for (int j = 0; j < 2; ++j) pack_b(products[j], rows, columns(products[j], n0), b_[j]);
      for (int64_t tile = tiles_of_units.begin; tile < tiles_of_units.end; ++tile) {
        const int64_t unit = tile * kHeight;
        BFloat16* of_units_a = a_ + (tile - tiles_of_units.begin) * kOfA;
        for (int i = 0; i < kParts<S> && n0 == 0; ++i) {
          pack_a(a.at<S>(0, unit) + i * a.part, places, units.size() - unit, tiles,
                 of_units_a + i * kPart);
        }
        for (int j = 0; j < 2; ++j) {
          const Range some = columns(products[j], n0);
          multiply(of_units_a, some.size(), tiles, b_[j], sums_[j]);
          for (int64_t u = 0; u < kHeight; u += kTileRows) {
            add_sums(products[j], units.at(unit + u), some, sums_[j] + u * kColumns);
          }
        }
      }
    }
  }

 private:
  static Range columns(const Product& p, int64_t n0) {
    return {n0, p.c && n0 < p.n ? min(p.n, n0 + kWidth) : n0};
  }

  static void pack_b(const Product& p, const Rows& rows, Range columns, BFloat16* to) {
    const auto load = [&](int64_t row, int64_t column) {
      const int64_t n = columns.size() - column;
      auto half = load_half(p.b + rows[row] * p.n + columns.begin + column, n);
      if constexpr (std::is_same_v<S, float>) {
        const int64_t place = rows[row] % p.period * p.n + columns.begin + column;
        if (p.scale) half *= load_half(p.scale + place, n);
      }
      return half;
    };
    const int64_t tiles = tiles_along(rows.count), wide = row_tiles(columns.size());
    pack_columns_of_tiles<S>(load, rows.count, {tiles, wide, tiles}, {0, wide}, to);
  }

  // n units, at most 32, of rows at the given places, as many as whole tiles take.
  static void pack_a(const BFloat16* a, const int64_t* rows, int64_t n, int64_t tiles,
                     BFloat16* to) {
    for (int64_t tile = 0; tile < tiles; ++tile, rows += kTileDepth) {
      // Short runs that no hardware foresees.
      for (int i = 0; i < kTileDepth && tile + 1 < tiles; ++i) {
        __builtin_prefetch(a + rows[kTileDepth + i]);
      }
      for (int half = 0; half < kTilesOfRows; ++half) {
        const int64_t skip = half * kTileRows;
        __m512i of_rows[kTileRows];
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i) {
          of_rows[i] = in_pairs(load_half(a + rows[2 * i] + skip, n - skip),
                                load_half(a + rows[2 * i + 1] + skip, n - skip));
        }
        store_transposed(of_rows, to + skip * kStride + tile * kTileDepth, kStride);
      }
    }
  }

  // The sums of all columns, [columns / 32][32][32].
  static void multiply(BFloat16* a, int64_t columns, int64_t tiles, const BFloat16* b,
                       float* sums) {
    const int64_t size = tiles * kTileNumbers<S>;
    const LeftFactor left{a, kStride, kPart, kTilesOfPiece<S> * kTileDepth};
    for (int64_t j = 0; j < columns; j += kColumns, sums += kHeight * kColumns) {
      multiply_tiles<S>(kTilesOfRows, row_tiles(columns - j), left,
                        {b + j / kTileRows * size, size}, tiles, {}, {sums, kColumns * 4});
    }
  }

  // Row by row, in order of memory.
  static void add_sums(const Product& p, Range units, Range columns, const float* sums) {
    for (int64_t u = units.begin; u < units.end; ++u, sums += kColumns) {
      float* c = p.c + u * p.n + columns.begin;
      for (int64_t j = 0; j < columns.size(); j += kTileRows) {
        const int n = static_cast<int>(min(kTileRows, columns.size() - j));
        const Sums more = frnn::load<Sums>(sums + j / kColumns * kHeight * kColumns + j % kColumns);
        frnn::store(c + j, frnn::load<Sums>(c + j, n) + more, n);
      }
    }
  }

  float* const sums_[2];
  BFloat16* const b_[2];  // packed
  BFloat16* const a_;     // packed, of all units
};
