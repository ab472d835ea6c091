// SPDX-License-Identifier: Apache-2.0
// Products on AMX tiles, with sums in float32. Included by recurrence.inl inside an anonymous
// namespace, in the translation units that are compiled for AMX.
//
// A tile is 16 rows of 64 bytes. One of the left factor holds 16 rows by 32 of k; one of the right
// factor holds 16 pairs of k by 16 columns. The instructions take subnormal values for zeros.
//
// The values of bfloat16 are factors as they are. One of float is the sum of three, see parts.h,
// and a product is the six of theirs that are not under 2^-26 of it, the smallest first: sums are
// rounded less often than those of single multiplications (Henry, Tang and Heinecke, Leveraging the
// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations, 2019).

constexpr int kTileRows = 16, kTileDepth = 32;
// What is multiplied at a time has four tiles of sums: two of rows by two of columns, or one by
// four.
constexpr int kTilesOfRows = 2, kTilesOfSums = 4;

using Sums = Vec<float>;  // of a row and the columns of a tile

// GCC's tile intrinsics name neither the memory they read nor that they write.
inline void memory_barrier() { __asm__ __volatile__("" ::: "memory"); }

// Tiles of this thread while it works. Those of sums are 0 to 3, those of the left factor 4 and
// (with the lower rows) 5 if there are two, the others of the right factor.
class TileScope {
 public:
  TileScope() { configure(kAllRows); }
  ~TileScope() { _tile_release(); }

  // From here on tiles of the left factor and of sums have so many rows together; fewer take less
  // time. More than all rows come in turns, whole tiles each; a tile without rows is none.
  static void set_rows(int64_t rows) {
    const int wanted = 0 < rows && rows < kAllRows ? static_cast<int>(rows) : kAllRows;
    if (wanted != rows_) configure(wanted);
  }

 private:
  static constexpr int kAllRows = kTilesOfRows * kTileRows;

  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };

  static void configure(int rows) {
    const int upper = rows < kTileRows ? rows : kTileRows;
    const auto below = static_cast<uint8_t>(rows - upper);
    Config config{};
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.rows[i] = i > 4 ? kTileRows : static_cast<uint8_t>(upper);
    }
    if (below) config.rows[2] = config.rows[3] = config.rows[5] = below;
    memory_barrier();
    _tile_loadconfig(&config);
    rows_ = rows;
  }

  static thread_local int rows_;
};
thread_local int TileScope::rows_ = 0;

// The first n of 16 numbers, zeros for the rest.
inline __mmask16 first_of(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0);
}
inline __m256i load_half(const BFloat16* p, int64_t n) {
  return _mm256_maskz_loadu_epi16(first_of(n), p);
}
inline Sums load_half(const float* p, int64_t n) {
  return (Sums)_mm512_maskz_loadu_ps(first_of(n), p);
}

// The parts of the first n of 32 numbers, zeros for the rest.
template <bool kLimited = false>
void load_some(const BFloat16* p, int64_t n, __m512i (&parts)[1]) {
  const auto mask = static_cast<__mmask32>(n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0);
  parts[0] = _mm512_maskz_loadu_epi16(mask, p);
}
template <bool kLimited = false>
void load_some(const float* p, int64_t n, __m512i (&parts)[3]) {
  const auto limit = [](Sums x) {
    constexpr float kMost = 0x1.fep127f;
    x = x > kMost ? frnn::broadcast<Sums>(kMost) : x;
    return x < -kMost ? frnn::broadcast<Sums>(-kMost) : x;
  };
  Sums halves[2] = {load_half(p, n), load_half(p + 16, n - 16)};
  for (Sums& half : halves) half = kLimited ? limit(half) : half;
  const frnn::Parts first(halves[0]), second(halves[1]);
  for (int i = 0; i < 3; ++i) {
    const __m512i lower = _mm512_maskz_inserti64x4(0xff, __m512i{}, first.part[i], 0);
    parts[i] = _mm512_maskz_inserti64x4(0xff, lower, second.part[i], 1);
  }
}

// The numbers of two in turn: pairs along k.
inline __m512i in_pairs(__m256i even, __m256i odd) {
  using Numbers = frnn::Vector<uint16_t, 16>;
  using Pairs = frnn::Vector<uint32_t, 16>;
  const Pairs low = __builtin_convertvector(__builtin_bit_cast(Numbers, even), Pairs);
  const Pairs high = __builtin_convertvector(__builtin_bit_cast(Numbers, odd), Pairs);
  return __builtin_bit_cast(__m512i, low | high << 16);
}
inline void in_pairs(__m256i even, __m256i odd, __m512i (&parts)[1]) {
  parts[0] = in_pairs(even, odd);
}
inline void in_pairs(Sums even, Sums odd, __m512i (&parts)[3]) {
  const frnn::Parts low(even), high(odd);
  for (int i = 0; i < 3; ++i) parts[i] = in_pairs(low.part[i], high.part[i]);
}

// Transposes a tile of 16 rows of pairs and stores it, `stride` numbers from row to row.
inline void store_transposed(const __m512i (&rows)[kTileRows], BFloat16* to, int64_t stride) {
  Sums tile[kTileRows];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) tile[i] = __builtin_bit_cast(Sums, rows[i]);
  exchange<kTileRows / 2, float>(tile, std::make_integer_sequence<int, kTileRows>{});
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    _mm512_storeu_si512(to + i * stride, __builtin_bit_cast(__m512i, tile[i]));
  }
}

// ---- Left factors.

// Some rows of a [.., lda], whole tiles of them -> rows from `first` on. If limited, the largest
// numbers take the place of infinite ones, of which there are no parts.
template <bool kLimited, class S>
void lay_rows(const S* a, int64_t lda, const Rows& rows, int64_t k, const LeftFactor& to,
              int64_t first) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const S* from = a + rows[i] * lda;
    for (int64_t k0 = 0; k0 < k; k0 += kTileDepth) {
      __m512i parts[kParts<S>];
      load_some<kLimited>(from + k0, k - k0, parts);
      BFloat16* place = to.at<S>(first + i, k0);
      for (int j = 0; j < kParts<S>; ++j) _mm512_storeu_si512(place + j * to.part, parts[j]);
    }
  }
}

// ---- Right factors: tiles, each with all its parts, in pieces along k, each of all columns.

template <class S>
struct InPieces {
  int64_t tiles, columns;            // tiles along k, and of columns
  int64_t depth = kTilesOfPiece<S>;  // tiles along k of a piece

  int64_t operator()(int64_t tile, int64_t column) const {
    const int64_t begin = tile - tile % depth;
    return (begin * columns + column * min(depth, tiles - begin) + tile - begin) * kTileNumbers<S>;
  }
};

// w [G*N, K], units along rows -> the given blocks of packed, G columns of tiles each. Lanes beyond
// N and values beyond K become 0.
template <class S>
void pack_tiles(const S* w, int gates, int64_t units, int64_t k, Range blocks, BFloat16* packed) {
  const InPieces<S> at{tiles_along(k), gates * row_tiles(units)};
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t u = block * kTileRows, n = min(kTileRows, units - u);
    for (int g = 0; g < gates; ++g) {
      for (int64_t k0 = 0; k0 < k; k0 += kTileDepth) {
        __m512i rows[kParts<S>][kTileRows] = {};
        for (int64_t lane = 0; lane < n; ++lane) {
          __m512i parts[kParts<S>];
          load_some(w + (g * units + u + lane) * k + k0, k - k0, parts);
          for (int i = 0; i < kParts<S>; ++i) rows[i][lane] = parts[i];
        }
        BFloat16* to = packed + at(k0 / kTileDepth, block * gates + g);
        for (int i = 0; i < kParts<S>; ++i) {
          store_transposed(rows[i], to + i * kPartNumbers, kTileDepth);
        }
      }
    }
  }
}

// Some columns of tiles, rows along k -> packed; load(row, column) gives 16 numbers.
template <class S, class Load>
void pack_columns_of_tiles(const Load& load, int64_t rows, const InPieces<S>& at, Range columns,
                           BFloat16* packed) {
  for (int64_t i = 0; i < at.tiles * kTileRows; ++i) {
    for (int64_t block = columns.begin; block < columns.end; ++block) {
      const auto half = [&](int64_t row) {
        return row < rows ? load(row, block * kTileRows) : decltype(load(0, 0)){};
      };
      BFloat16* to = packed + at(i / kTileRows, block) + i % kTileRows * kTileDepth;
      __m512i parts[kParts<S>];
      in_pairs(half(2 * i), half(2 * i + 1), parts);
      for (int j = 0; j < kParts<S>; ++j) _mm512_storeu_si512(to + j * kPartNumbers, parts[j]);
    }
  }
}

// ---- Products.

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

// c[16 * kRows][16 * kColumns] = a . b + more, if that is there, of rows `stride` numbers and parts
// `part` numbers apart.
template <int kParts, int kRows, int kColumns>
void multiply_tiles(const BFloat16* a, int64_t stride, int64_t part, const Tiles& b, int64_t tiles,
                    const SumsAt& more, const SumsAt& c) {
  static_assert(kRows * kColumns <= kTilesOfSums && kRows <= kTilesOfRows);
  constexpr bool kFour = kColumns > 2;  // then 5 is of the right factor
  const auto second = [](const SumsAt& sums) {
    return sums.data + (kFour ? 2 * kTileRows : kTileRows * sums.stride / 4);
  };
  memory_barrier();
  if (more.data) {
    _tile_loadd(0, more.data, more.stride);
    if (kColumns > 1) _tile_loadd(1, more.data + kTileRows, more.stride);
    if (kRows > 1 || kFour) _tile_loadd(2, second(more), more.stride);
    if (kRows * kColumns > 3) _tile_loadd(3, second(more) + kTileRows, more.stride);
  } else {
    _tile_zero(0);
    if (kColumns > 1) _tile_zero(1);
    if (kRows > 1 || kFour) _tile_zero(2);
    if (kRows * kColumns > 3) _tile_zero(3);
  }
  for (int64_t i = 0; i < tiles; ++i, a += kTileDepth) {
    const auto load_left = [&](int j) __attribute__((always_inline)) {
      _tile_loadd(4, a + j * part, stride * 2);
      if (kRows > 1) _tile_loadd(5, a + j * part + kTileRows * stride, stride * 2);
    };
    const auto multiply = [&](int j, bool anew) __attribute__((always_inline)) {
      const BFloat16* q = b.data + (i * kParts + j) * kPartNumbers;
      if (kFour || anew) _tile_loadd(6, q, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (kColumns > 1 && (kFour || anew)) _tile_loadd(7, q + b.stride, 64);
      if (kColumns > 1) _tile_dpbf16ps(1, 4, 7);
      if (kRows > 1) _tile_dpbf16ps(2, 5, 6);
      if (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
      if (kFour) _tile_loadd(5, q + 2 * b.stride, 64);
      if (kFour) _tile_dpbf16ps(2, 4, 5);
      if (kColumns > 3) _tile_loadd(6, q + 3 * b.stride, 64);
      if (kColumns > 3) _tile_dpbf16ps(3, 4, 6);
    };
    if constexpr (kParts == 1) {
      load_left(0);
      multiply(0, true);
    } else {
      load_left(0);
      multiply(2, true);
      multiply(1, true);
      load_left(1);
      multiply(1, false);
      multiply(0, true);
      load_left(2);
      multiply(0, false);
      load_left(0);
      multiply(0, false);
    }
  }
  _tile_stored(0, c.data, c.stride);
  if (kColumns > 1) _tile_stored(1, c.data + kTileRows, c.stride);
  if (kRows > 1 || kFour) _tile_stored(2, second(c), c.stride);
  if (kRows * kColumns > 3) _tile_stored(3, second(c) + kTileRows, c.stride);
  memory_barrier();
}
// .. of up to two tiles of rows, and as many of columns as there are tiles of sums for.
template <class S>
void multiply_tiles(int64_t rows, int64_t columns, const BFloat16* a, int64_t stride, int64_t part,
                    const Tiles& b, int64_t tiles, const SumsAt& more, const SumsAt& c) {
  constexpr int kOf = kParts<S>;
  const auto multiply = rows > 1
                            ? columns > 1 ? multiply_tiles<kOf, 2, 2> : multiply_tiles<kOf, 2, 1>
                        : columns > 3  ? multiply_tiles<kOf, 1, 4>
                        : columns == 3 ? multiply_tiles<kOf, 1, 3>
                        : columns > 1  ? multiply_tiles<kOf, 1, 2>
                                       : multiply_tiles<kOf, 1, 1>;
  multiply(a, stride, part, b, tiles, more, c);
}

// As product(), of rows of a left factor from the given one on, with a depth of k, and packed
// weights of all_blocks blocks. Piece by piece along k: of some rows it stays in the L1 cache for
// all blocks, and of some blocks in the L2 cache for all rows. Scratch has place for
// sums_of_tiles().
template <int kGates, class S, class Wanted, class Fetch, class Finish>
void product_of_tiles(const LeftFactor& a, int64_t first_row, Range rows, int64_t k,
                      const BFloat16* packed, int64_t all_blocks, Range blocks, bool backwards,
                      float* scratch, const Wanted& wanted, const Fetch& fetch,
                      const Finish& finish) {
  constexpr int kRows = kTilesOfRows * kTileRows, kBlocks = kGates == 1 ? kTilesOfSums : 1;
  constexpr int64_t kSums = kRows * kBlocks * kGates;
  constexpr int64_t kDeep = kTilesOfPiece<S>;
  const InPieces<S> at{tiles_along(k), all_blocks * kGates};
  const int pieces = static_cast<int>((at.tiles + kDeep - 1) / kDeep);
  const int64_t groups = (blocks.size() + kBlocks - 1) / kBlocks;
  TileScope::set_rows(rows.size());
  const bool later = rows.size() <= kTileRows;
  const int64_t panel = rows.size() > kRows ? kPanelColumns / (kBlocks * kGates) : groups;
  for (int64_t first_group = 0; first_group < groups; first_group += panel) {
    const int64_t end_group = min(groups, first_group + panel);
    for (int piece = 0; piece < pieces; ++piece) {
      const int64_t first = kDeep * (backwards ? pieces - 1 - piece : piece);
      const int64_t tiles = min(kDeep, at.tiles - first);
      Sums* sum = reinterpret_cast<Sums*>(scratch);
      for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRows) {
        const int n = static_cast<int>(min(kRows, rows.end - r0));
        const bool some = !all_of({r0, r0 + n}, [&](int64_t row) { return !wanted(row); });
        const BFloat16* left = a.at<S>(first_row + r0 - rows.begin, first * kTileDepth);
        for (int64_t i = first_group; i < end_group; ++i) {
          const int64_t block = blocks.begin + kBlocks * (backwards ? groups - 1 - i : i);
          const int some_blocks = static_cast<int>(min(kBlocks, blocks.end - block));
          const int columns = some_blocks * kGates;
          const Range fetched = part(n, piece, pieces);
          for (int64_t row = fetched.begin; row < fetched.end; ++row) {
            for (int j = 0; j < some_blocks; ++j) fetch(r0 + row, block + j);
          }
          const BFloat16* w = packed + at(first, block * kGates);
          const int at_once = kTilesOfSums / static_cast<int>(row_tiles(n));
          for (int column = 0; some && column < columns; column += at_once) {
            const int64_t size = tiles * kTileNumbers<S>;
            const SumsAt c{reinterpret_cast<float*>(sum + column), columns * 64};
            multiply_tiles<S>(row_tiles(n), columns - column, left, a.row, a.part,
                              {w + column * size, size}, tiles, piece > 0 ? c : SumsAt{}, c);
          }
          if (piece + 1 == pieces && !later) finish(Tile{r0, block, n, some_blocks}, sum);
          if (pieces > 1 || later) sum += kSums;
        }
        if (piece + 1 < pieces || !later) continue;
        sum = reinterpret_cast<Sums*>(scratch);
        for (int64_t i = first_group; i < end_group; ++i, sum += kSums) {
          const int64_t block = blocks.begin + kBlocks * (backwards ? groups - 1 - i : i);
          finish(Tile{r0, block, n, static_cast<int>(min(kBlocks, blocks.end - block))}, sum);
        }
      }
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
  constexpr int64_t kPanel = kPanelColumns / kGates;
  const InPieces<S> at{tiles_along(k), all_blocks * kGates};
  for (int64_t panel = blocks.begin; panel < blocks.end; panel += kPanel) {
    for (int64_t first = 0; first < at.tiles; first += kTilesOfPiece<S>) {
      const int64_t tiles = min(kTilesOfPiece<S>, at.tiles - first);
      const int64_t size = tiles * kTileNumbers<S>;
      for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
        const int64_t n = min(kRows, rows - r0);
        TileScope::set_rows(n);
        const int64_t at_once = kTilesOfSums / row_tiles(n);
        for (int64_t block = panel; block < min(blocks.end, panel + kPanel); ++block) {
          const BFloat16* w = packed + at(first, block * kGates);
          float* sums = c + (block - blocks.begin) * of_block + r0 * of_row;
          for (int64_t column = 0; column < kGates; column += at_once) {
            const SumsAt to{sums + column * kTileRows, of_row * 4};
            const SumsAt more{bias + block * kWidth + column * kTileRows, 0};
            multiply_tiles<S>(row_tiles(n), kGates - column, a.at<S>(r0, first * kTileDepth), a.row,
                              a.part, {w + column * size, size}, tiles, first > 0 ? to : more, to);
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

  // For some tiles of 32 units of m. Of a left factor these are the rows of_a, of b the others;
  // there are at most kTileChunk.
  void add(const LeftFactor& a, const Rows& of_a, int64_t m, Range of_units, const Rows& rows,
           const Product (&products)[2]) const {
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
      for (int64_t tile = of_units.begin; tile < of_units.end; ++tile) {
        const int64_t unit = tile * kHeight;
        BFloat16* of_units_a = a_ + (tile - of_units.begin) * kOfA;
        for (int i = 0; i < kParts<S> && n0 == 0; ++i) {
          pack_a(a.at<S>(0, unit) + i * a.part, places, m - unit, tiles, of_units_a + i * kPart);
        }
        for (int j = 0; j < 2; ++j) {
          const Range some = columns(products[j], n0);
          multiply(of_units_a, some.size(), tiles, b_[j], sums_[j]);
          add_sums(products[j], {unit, min(m, unit + kHeight)}, some, sums_[j]);
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
  static void multiply(const BFloat16* a, int64_t columns, int64_t tiles, const BFloat16* b,
                       float* sums) {
    const int64_t size = tiles * kTileNumbers<S>;
    for (int64_t j = 0; j < columns; j += kColumns, sums += kHeight * kColumns) {
      multiply_tiles<S>(kTilesOfRows, row_tiles(columns - j), a, kStride, kPart,
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
