// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 values on AMX tiles, with sums in float32. Included by recurrence.inl inside
// an anonymous namespace, in the translation unit that is compiled for AMX.
//
// A tile is 16 rows of 64 bytes. One of the left factor holds 16 of its rows by 32 of k; one of the
// right factor holds 32 of k by 16 columns. Both are packed tile by tile, along k, of which those
// 16 apart make a pair. Where rounding the left factor would cost accuracy it comes in two parts,
// its values rounded and what is left of them: 16 bits of each, for twice the multiplications. The
// instructions take subnormal values for zeros.

constexpr int kTileRows = 16, kTileDepth = 32;
// Columns of the right factor that are multiplied at a time, in tiles, and rows of the left one.
constexpr int kTileColumns = 2, kTilesOfRows = 2;

// GCC's tile intrinsics name neither the memory they read nor that they write.
inline void memory_barrier() { __asm__ __volatile__("" ::: "memory"); }

// Tiles of this thread while it works.
class TileScope {
 public:
  explicit TileScope(bool needed) : needed_(needed) {
    if (!needed_) return;
    Config config{};
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.rows[i] = kTileRows;
    }
    memory_barrier();
    _tile_loadconfig(&config);
  }
  ~TileScope() {
    if (needed_) _tile_release();
  }

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  const bool needed_;
};

// The first n of 16 numbers, zeros for the rest.
inline Vec<float> load_some(const float* p, int64_t n) {
  const auto mask = static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0);
  return __builtin_bit_cast(Vec<float>, _mm512_maskz_loadu_ps(mask, p));
}

// Pairs of numbers, rounded to bfloat16.
inline Vec<float> pairs_of(Vec<float> first, Vec<float> second) {
  constexpr frnn::Vector<uint16_t, 32> kOrder = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both =
      _mm512_cvtne2ps_pbh(__builtin_bit_cast(__m512, second), __builtin_bit_cast(__m512, first));
  return __builtin_bit_cast(Vec<float>,
                            _mm512_permutexvar_epi16(__builtin_bit_cast(__m512i, kOrder),
                                                     __builtin_bit_cast(__m512i, both)));
}

// Of numbers and their pairs, what rounding left.
inline Vec<float> rest_of(Vec<float> first, Vec<float> second, Vec<float> pairs) {
  using Bits = frnn::Value<Vec<float>>::Bits;
  const Bits bits = __builtin_bit_cast(Bits, pairs);
  return pairs_of(first - __builtin_bit_cast(Vec<float>, Bits(bits << 16)),
                  second - __builtin_bit_cast(Vec<float>, Bits(bits & 0xffff0000u)));
}

// The 16 vectors of a tile, transposed.
inline void transpose_tile(Vec<float> (&tile)[kTileRows]) {
  exchange<kTileRows / 2, float>(tile, std::make_integer_sequence<int, kTileRows>{});
}

// w [G*N, K], units along rows -> the given blocks of packed [blocks][G][tiles]. Lanes beyond N and
// values beyond K become 0.
template <class T>
void pack_tiles(const T* w, int gates, int64_t units, int64_t k, Range blocks, T* packed) {
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t u = block * kTileRows, n = min(kTileRows, units - u);
    for (int g = 0; g < gates; ++g) {
      T* to = packed + (block * gates + g) * tiles_along(k) * kTileNumbers;
      for (int64_t k0 = 0; k0 < k; k0 += kTileDepth, to += kTileNumbers) {
        Vec<T> tile[kTileRows] = {};
        for (int64_t lane = 0; lane < n; ++lane) {
          const T* p = w + (g * units + u + lane) * k + k0;
          tile[lane] = pairs_of(load_some(p, k - k0), load_some(p + 16, k - k0 - 16));
        }
        transpose_tile(tile);
        for (int i = 0; i < kTileRows; ++i) frnn::store(to + i * kTileRows, tile[i]);
      }
    }
  }
}

// w [.., ldw], units along columns, one gate, its rows along k -> the given blocks of packed; row i
// is multiplied by row rows[i] % period of scale [.., N], unless that is null.
template <class T>
void pack_tiles_of_columns(const T* w, int64_t ldw, int64_t units, const Rows& rows, Range blocks,
                           const T* scale, int64_t period, T* packed) {
  const int64_t k = rows.count, size = tiles_along(k) * kTileNumbers;
  for (int64_t k0 = 0; k0 < k; k0 += kTileDepth) {
    for (int i = 0; i < kTileRows; ++i) {
      T* to = packed + k0 / kTileDepth * kTileNumbers + i * kTileRows;
      const auto load = [&](int64_t row, int64_t u) {
        if (row >= k) return Vec<T>{};
        const Vec<T> values = load_some(w + rows[row] * ldw + u, units - u);
        return scale ? values * load_some(scale + rows[row] % period * ldw + u, units - u) : values;
      };
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        const int64_t u = block * kTileRows;
        frnn::store(to + block * size, pairs_of(load(k0 + i, u), load(k0 + i + 16, u)));
      }
    }
  }
}

// Tiles along k, of some parts each, and the way from these to the next 16 rows or columns.
struct Tiles {
  const float* data;
  int64_t stride;
};

// c[16 * kRows][16 * kColumns] = a . b, of a all kParts.
template <int kRows, int kColumns, int kParts>
void multiply_tiles(Tiles a, Tiles b, int64_t tiles, float* c, int64_t row_bytes) {
  static_assert(kRows <= kTilesOfRows && kColumns <= kTileColumns);
  memory_barrier();
  _tile_zero(0);
  if (kColumns > 1) _tile_zero(1);
  if (kRows > 1) _tile_zero(2);
  if (kRows > 1 && kColumns > 1) _tile_zero(3);
  for (int64_t i = 0; i < tiles; ++i) {
    const float* p = a.data + i * kParts * kTileNumbers;
    const float* q = b.data + i * kTileNumbers;
    _tile_loadd(6, q, 64);
    if (kColumns > 1) _tile_loadd(7, q + b.stride, 64);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part, p += kTileNumbers) {
      _tile_loadd(4, p, 64);
      if (kRows > 1) _tile_loadd(5, p + a.stride, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (kColumns > 1) _tile_dpbf16ps(1, 4, 7);
      if (kRows > 1) _tile_dpbf16ps(2, 5, 6);
      if (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  float* below = c + kTileRows * row_bytes / 4;
  _tile_stored(0, c, row_bytes);
  if (kColumns > 1) _tile_stored(1, c + kTileRows, row_bytes);
  if (kRows > 1) _tile_stored(2, below, row_bytes);
  if (kRows > 1 && kColumns > 1) _tile_stored(3, below + kTileRows, row_bytes);
  memory_barrier();
}
// .. of up to two tiles of rows and of columns.
template <int kParts>
void multiply_tiles(int64_t rows, int64_t columns, Tiles a, Tiles b, int64_t tiles, float* c,
                    int64_t row_bytes) {
  const auto multiply =
      rows > 1      ? columns > 1 ? multiply_tiles<2, 2, kParts> : multiply_tiles<2, 1, kParts>
      : columns > 1 ? multiply_tiles<1, 2, kParts>
                    : multiply_tiles<1, 1, kParts>;
  multiply(a, b, tiles, c, row_bytes);
}

// As product(), of rows in kParts parts and weights from pack_tiles.
template <int kGates, int kParts, class T, class Wanted, class Fetch, class Finish>
void product_of_tiles(const T* a, int64_t lda, Range rows, int64_t k, const T* packed, Range blocks,
                      bool backwards, T* scratch, const Wanted& wanted, const Fetch& fetch,
                      const Finish& finish) {
  constexpr int kRows = kTilesOfRows * kTileRows, kBlocks = kGates == 1 ? kTileColumns : 1;
  const int64_t tiles = tiles_along(k), size = tiles * kTileNumbers;
  for (int64_t row = rows.begin; row < rows.begin + row_tiles(rows.size()) * kTileRows; ++row) {
    const int64_t r = row - rows.begin, n = row < rows.end ? k : 0;
    const T* from = a + row * lda;
    T* to = scratch + r / kTileRows * kParts * size + r % kTileRows * kTileRows;
    for (int64_t k0 = 0; k0 < k; k0 += kTileDepth, to += kParts * kTileNumbers) {
      const Vec<T> first = load_some(from + k0, n - k0);
      const Vec<T> second = load_some(from + k0 + 16, n - k0 - 16);
      const Vec<T> pairs = pairs_of(first, second);
      frnn::store(to, pairs);
      if (kParts > 1) frnn::store(to + kTileNumbers, rest_of(first, second, pairs));
    }
  }
  alignas(64) Vec<T> sum[kRows * kBlocks * kGates];
  const int64_t groups = (blocks.size() + kBlocks - 1) / kBlocks;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t block = blocks.begin + kBlocks * (backwards ? groups - 1 - i : i);
    const int some_blocks = static_cast<int>(min(kBlocks, blocks.end - block));
    const int columns = some_blocks * kGates;
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRows) {
      const int n = static_cast<int>(min(kRows, rows.end - r0));
      bool some = false;
      for (int row = 0; row < n; ++row) {
        some |= wanted(r0 + row);
        for (int j = 0; j < some_blocks; ++j) fetch(r0 + row, block + j);
      }
      const Tiles left{scratch + (r0 - rows.begin) / kTileRows * kParts * size, kParts * size};
      for (int column = 0; some && column < columns; column += kTileColumns) {
        const Tiles right{packed + (block * kGates + column) * size, size};
        multiply_tiles<kParts>(row_tiles(n), columns - column, left, right, tiles,
                               reinterpret_cast<T*>(sum + column), columns * 64);
      }
      finish(Tile{r0, block, n, some_blocks}, sum);
    }
  }
}

// As Outer: of a in two parts and b rounded.
template <class T>
class OuterOfTiles {
  using Product = OuterProduct<T>;
  static constexpr int64_t kHeight = kTilesOfRows * kTileRows, kDepth = 256, kWidth = 512;

 public:
  static constexpr int64_t kScratch = kHeight * kDepth + kWidth * kTileChunk;  // numbers

  explicit OuterOfTiles(T* scratch)
      : a_(scratch), b_{a_ + kHeight * kDepth, a_ + kHeight * kDepth + kWidth * kTileChunk / 2} {}

  // rows.count is at most kTileChunk.
  void add(const T* a, int64_t m, Range units, const Rows& rows,
           const Product (&products)[2]) const {
    int64_t most = 0;
    for (const Product& p : products) most = p.c && p.n > most ? p.n : most;
    for (int64_t n0 = 0; n0 < most; n0 += kWidth) {
      for (int j = 0; j < 2; ++j) {
        const Product& p = products[j];
        const Range some = columns(p, n0);
        const T* scale = p.scale ? p.scale + n0 : nullptr;
        pack_tiles_of_columns(p.b + n0, p.n, some.size(), rows, {0, blocks_of<T>(some.size())},
                              scale, p.period, b_[j]);
      }
      for (int64_t m0 = units.begin; m0 < units.end; m0 += kHeight) {
        const Range some{m0, min(units.end, m0 + kHeight)};
        for (int64_t k0 = 0; k0 < rows.count; k0 += kDepth) {
          const Rows piece = rows.from(k0, min(rows.count - k0, kDepth));
          pack_a(a, m, some, piece);
          for (int j = 0; j < 2; ++j) {
            const Tiles b{b_[j] + tiles_along(k0) * kTileNumbers,
                          tiles_along(rows.count) * kTileNumbers};
            add_block(products[j], some, columns(products[j], n0), tiles_along(piece.count), b);
          }
        }
      }
    }
  }

 private:
  static Range columns(const Product& p, int64_t n0) {
    return {n0, p.c && n0 < p.n ? min(p.n, n0 + kWidth) : n0};
  }

  // Some units of the rows of a [.., M], units along the tiles' rows.
  void pack_a(const T* a, int64_t m, Range units, const Rows& rows) const {
    T* to = a_;
    for (int64_t u = units.begin; u < units.end; u += kTileRows) {
      const auto load = [&](int64_t row) {
        return load_some(a + rows[min(row, rows.count - 1)] * m + u,
                         row < rows.count ? units.end - u : 0);
      };
      for (int64_t k0 = 0; k0 < rows.count; k0 += kTileDepth, to += 2 * kTileNumbers) {
        Vec<T> high[kTileRows], low[kTileRows];
        for (int i = 0; i < kTileRows; ++i) {
          const Vec<T> first = load(k0 + i), second = load(k0 + i + 16);
          high[i] = pairs_of(first, second);
          low[i] = rest_of(first, second, high[i]);
        }
        transpose_tile(high);
        transpose_tile(low);
        for (int i = 0; i < kTileRows; ++i) {
          frnn::store(to + i * kTileRows, high[i]);
          frnn::store(to + kTileNumbers + i * kTileRows, low[i]);
        }
      }
    }
  }

  void add_block(const Product& p, Range units, Range columns, int64_t tiles, Tiles b) const {
    constexpr int64_t kColumns = kTileColumns * kTileRows;
    alignas(64) T sum[kHeight * kColumns];
    const Tiles a{a_, 2 * tiles * kTileNumbers};
    for (int64_t column = columns.begin; column < columns.end;
         column += kColumns, b.data += kTileColumns * b.stride) {
      const int64_t n = min(kColumns, columns.end - column);
      T* c = p.c + units.begin * p.n + column;
      for (int64_t i = 0; i < units.size(); ++i) {
        __builtin_prefetch(c + i * p.n, 1);
        __builtin_prefetch(c + i * p.n + n - 1, 1);
      }
      multiply_tiles<2>(row_tiles(units.size()), row_tiles(n), a, b, tiles, sum, kColumns * 4);
      for (int64_t i = 0; i < units.size(); ++i, c += p.n) {
        for (int64_t j = 0; j < n; j += kTileRows) {
          const int lanes = static_cast<int>(min(kTileRows, n - j));
          const Vec<T> more = frnn::load<Vec<T>>(sum + i * kColumns + j);
          frnn::store(c + j, frnn::load<Vec<T>>(c + j, lanes) + more, lanes);
        }
      }
    }
  }

  T* const a_;     // packed
  T* const b_[2];  // packed
};
