// SPDX-License-Identifier: Apache-2.0
// How factors of products on tiles lie in memory, for the drivers; amx.inl makes and multiplies
// them. Included by recurrence.inl inside an anonymous namespace.

// Whether there are tiles. Those of values stored in bfloat16 take all products; those of float, of
// which a value has three parts, the ones of many steps at once and, with enough rows, those of
// each step, and vectors take the rest.
#if defined(FRNN_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif
template <class S>
constexpr int kParts = std::is_same_v<S, float> ? 3 : 1;

// Numbers of a tile, and of the tiles of all parts.
constexpr int64_t kPartNumbers = 512;
template <class S>
constexpr int64_t kTileNumbers = kParts<S> * kPartNumbers;
constexpr int64_t tiles_along(int64_t k) { return (k + 31) / 32; }
constexpr int64_t row_tiles(int64_t rows) { return (rows + 15) / 16; }
// Tiles along k of a piece of a left factor: those of 32 rows stay in the L1 cache, or nearly.
template <class S>
constexpr int64_t kTilesOfPiece = kParts<S> == 1 ? 16 : 8;
// .. and of those that are multiplied at once: with parts, these come from L2 soon enough.
template <class S>
constexpr int64_t kTilesAtOnce = kParts<S> == 1 ? 16 : 32;
// Blocks, of so many columns each, that many rows pass by at a time: they take a part of the L2
// cache.
template <class S>
constexpr int64_t blocks_of_panel(int64_t tiles, int64_t columns) {
  constexpr int64_t kNumbers = 16 * kTilesOfPiece<S> * kTileNumbers<S>;
  const int64_t blocks = kNumbers / (min(tiles, kTilesAtOnce<S>) * kTileNumbers<S> * columns);
  return blocks < 1 ? 1 : blocks;
}

// How a left factor lies: how many numbers lead to the next row, part, and piece.
struct LeftFactor {
  BFloat16* data;
  int64_t row, part, piece;

  template <class S>
  BFloat16* at(int64_t r, int64_t k) const {
    constexpr int64_t kDepth = 32 * kTilesOfPiece<S>;
    return data + r * row + k / kDepth * piece + k % kDepth;
  }
  template <class S>
  LeftFactor from(int64_t r, int64_t k) const {
    return {at<S>(r, k), row, part, piece};
  }
};
// Rows whose place is read, though not used, beyond the last one.
constexpr int64_t kRowsBeyond = 31;
// Numbers from row to row of a piece, with all its parts: an odd number of lines, so that what is
// used together of many rows has room in the L1 cache.
template <class S>
constexpr int64_t kRowOfPiece = (kParts<S> * kTilesOfPiece<S> | 1) * 32;
template <class S>
constexpr int64_t laid_size(int64_t rows, int64_t k) {
  const int64_t pieces = (tiles_along(k) + kTilesOfPiece<S> - 1) / kTilesOfPiece<S>;
  return (pieces * rows + kRowsBeyond) * kRowOfPiece<S>;
}
template <class S>
constexpr LeftFactor laid(BFloat16* data, int64_t rows) {
  return {data, kRowOfPiece<S>, kTilesOfPiece<S> * 32, rows * kRowOfPiece<S>};
}

// Units of some gates, as they are along k on tiles: vector by vector, and those of all gates side
// by side, with zeros after the last one of each gate.
struct UnitsOfTiles {
  int gates;
  int64_t units;  // of a gate

  int64_t size() const { return (units + 15) / 16 * 16 * gates; }
  // Which of all gates' units a vector holds that begins at k.
  Range at(int64_t k) const {
    const int64_t gate = k / 16 % gates, unit = min(k / 16 / gates * 16, units);
    const int64_t begin = gate * units + unit;
    return {begin, begin + min(16, units - unit)};
  }
};

// What a product on tiles may begin with: another one, of as many rows and columns of packed
// weights of which all tiles along k are one piece, and biases [columns][16].
struct Beginning {
  LeftFactor a;
  const BFloat16* packed;
  int64_t tiles;  // 0: none
  float* bias;
};

// Numbers that product_of_tiles() needs for its sums.
template <class S>
constexpr int64_t sums_of_tiles(int64_t rows, int64_t k, int64_t columns) {
  const int64_t kept = tiles_along(k) > kTilesAtOnce<S> ? (rows + 31) / 32 * 32 : 2 * 32;
  return kept * ((columns + 63) / 64 * 64);
}
// Rows whose outer products are summed up at a time.
constexpr int64_t kTileChunk = 512;
