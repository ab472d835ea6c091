// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 values on AMX tiles, with sums in float32. Included by recurrence.inl inside
// an anonymous namespace, in the translation unit that is compiled for AMX.
//
// A tile is 16 rows of 64 bytes. One of the left factor holds 16 rows by 32 of k; one of the right
// factor holds 16 pairs of k by 16 columns. Where rounding the left factor would cost accuracy it
// comes in two parts, its values rounded and what is left of them: 16 bits of each, for twice the
// multiplications. The instructions take subnormal values for zeros.

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

// 32 numbers rounded to bfloat16, in order.
inline Vec<float> rounded(Vec<float> first, Vec<float> second) {
  return __builtin_bit_cast(Vec<float>, _mm512_cvtne2ps_pbh(__builtin_bit_cast(__m512, second),
                                                            __builtin_bit_cast(__m512, first)));
}

// The values of two vectors in turn, of the first from kFirst on, of the other from kSecond on.
template <int kFirst, int kSecond>
Vec<float> in_turn(Vec<float> a, Vec<float> b) {
  alignas(64) static constexpr struct Order {
    uint16_t index[32];
    constexpr Order() : index() {
      for (int i = 0; i < 32; ++i) index[i] = i / 2 + (i % 2 ? 32 + kSecond : kFirst);
    }
  } kOrder;
  return __builtin_bit_cast(Vec<float>, _mm512_permutex2var_epi16(__builtin_bit_cast(__m512i, a),
                                                                  _mm512_load_si512(kOrder.index),
                                                                  __builtin_bit_cast(__m512i, b)));
}

// The 16 vectors of a tile, transposed.
inline void transpose_tile(Vec<float> (&tile)[kTileRows]) {
  exchange<kTileRows / 2, float>(tile, std::make_integer_sequence<int, kTileRows>{});
}

// ---- Left factors: rows of [tiles][kParts][32 values]. From row to row it is an odd number of KB
// and a line, so that what is used together of many rows has room in the L1 cache.

template <int kParts>
constexpr int64_t row_size(int64_t k) {
  const int64_t size = tiles_along(k) * kParts * kTileRows, kb = (size + 255) / 256;
  return (kb | 1) * 256 + kTileRows;
}

// Rows of a [.., lda], rounded.
template <class T>
void round_rows(const T* a, int64_t lda, Range rows, int64_t k, T* to) {
  for (int64_t row = rows.begin; row < rows.end; ++row, to += row_size<1>(k)) {
    const T* from = a + row * lda;
    for (int64_t k0 = 0; k0 < k; k0 += kTileDepth) {
      const auto values =
          rounded(load_some(from + k0, k - k0), load_some(from + k0 + 16, k - k0 - 16));
      frnn::store(to + k0 / 2, values);
    }
  }
}

// Of 16 numbers of a row in two parts, those of its given block.
template <class T>
void split_block(Vec<T> value, int64_t block, T* row) {
  using Bits = frnn::Value<Vec<T>>::Bits;
  const auto high = _mm512_cvtneps_pbh(__builtin_bit_cast(__m512, value));
  const auto halves = __builtin_bit_cast(frnn::Vector<uint16_t, 16>, high);
  const Bits exact = __builtin_convertvector(halves, Bits) << 16;
  const Vec<T> rest = value - __builtin_bit_cast(Vec<T>, exact);
  const auto low = _mm512_cvtneps_pbh(__builtin_bit_cast(__m512, rest));
  T* to = row + block / 2 * 2 * kTileRows + block % 2 * 8;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), __builtin_bit_cast(__m256i, high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kTileRows), __builtin_bit_cast(__m256i, low));
}

// ---- Right factors: tiles in pieces along k, each of all columns.

struct InPieces {
  int64_t tiles, columns, piece;  // tiles along k, of columns, and of a piece along k

  int64_t operator()(int64_t tile, int64_t column) const {
    const int64_t begin = tile - tile % piece;
    return (begin * columns + column * min(piece, tiles - begin) + tile - begin) * kTileNumbers;
  }
};

// w [G*N, K], units along rows -> the given blocks of packed, G columns of tiles each. Lanes beyond
// N and values beyond K become 0.
template <class T>
void pack_tiles(const T* w, int gates, int64_t units, int64_t k, Range blocks, T* packed) {
  const InPieces at{tiles_along(k), gates * blocks_of<T>(units), kTilesOfPiece<1>};
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t u = block * kTileRows, n = min(kTileRows, units - u);
    for (int g = 0; g < gates; ++g) {
      for (int64_t k0 = 0; k0 < k; k0 += kTileDepth) {
        Vec<T> tile[kTileRows] = {};
        for (int64_t lane = 0; lane < n; ++lane) {
          const T* p = w + (g * units + u + lane) * k + k0;
          tile[lane] = rounded(load_some(p, k - k0), load_some(p + 16, k - k0 - 16));
        }
        transpose_tile(tile);
        T* to = packed + at(k0 / kTileDepth, block * gates + g);
        for (int i = 0; i < kTileRows; ++i) frnn::store(to + i * kTileRows, tile[i]);
      }
    }
  }
}

// The given blocks of columns of a right factor of depth k, where load(i, column) loads of row i.
template <class T, class Load>
void pack_columns_of_tiles(int64_t k, int64_t columns, Range blocks, const Load& load, T* packed) {
  const InPieces at{tiles_along(k), blocks_of<T>(columns), kTilesOfPiece<2>};
  for (int64_t i = 0; i < tiles_along(k) * kTileRows; ++i) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto pair = rounded(load(2 * i, block * kTileRows), load(2 * i + 1, block * kTileRows));
      T* to = packed + at(i / kTileRows, block) + i % kTileRows * kTileRows;
      frnn::store(to, in_turn<0, 16>(pair, pair));
    }
  }
}

// Weights w [G*H, N] for gradients in split rows of G*H.
template <class T>
void pack_tiles_of_gates(const T* w, int64_t gates, int64_t h, int64_t n, Range blocks, T* packed) {
  const int64_t of_gate = blocks_of<T>(h) * kTileRows;
  const auto load = [&](int64_t i, int64_t column) {
    const int64_t g = i / of_gate, u = i % of_gate;
    if (g >= gates || u >= h) return Vec<T>{};
    return load_some(w + (g * h + u) * n + column, n - column);
  };
  pack_columns_of_tiles(gates * of_gate, n, blocks, load, packed);
}

// ---- Products.

// Tiles along k, and the way from these to the next 16 columns.
struct Tiles {
  const float* data;
  int64_t stride;
};

// c[16 * kRows][16 * kColumns] (+)= a . b, of rows a all kParts, `stride` numbers apart.
template <int kRows, int kColumns, int kParts>
void multiply_tiles(const float* a, int64_t stride, const Tiles& b, int64_t tiles, bool accumulate,
                    float* c, int64_t row_bytes) {
  static_assert(kRows <= kTilesOfRows && kColumns <= kTileColumns);
  float* below = c + kTileRows * row_bytes / 4;
  memory_barrier();
  if (accumulate) {
    _tile_loadd(0, c, row_bytes);
    if (kColumns > 1) _tile_loadd(1, c + kTileRows, row_bytes);
    if (kRows > 1) _tile_loadd(2, below, row_bytes);
    if (kRows > 1 && kColumns > 1) _tile_loadd(3, below + kTileRows, row_bytes);
  } else {
    _tile_zero(0);
    if (kColumns > 1) _tile_zero(1);
    if (kRows > 1) _tile_zero(2);
    if (kRows > 1 && kColumns > 1) _tile_zero(3);
  }
  for (int64_t i = 0; i < tiles; ++i) {
    const float* q = b.data + i * kTileNumbers;
    _tile_loadd(6, q, 64);
    if (kColumns > 1) _tile_loadd(7, q + b.stride, 64);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part, a += kTileRows) {
      _tile_loadd(4, a, stride * 4);
      if (kRows > 1) _tile_loadd(5, a + kTileRows * stride, stride * 4);
      _tile_dpbf16ps(0, 4, 6);
      if (kColumns > 1) _tile_dpbf16ps(1, 4, 7);
      if (kRows > 1) _tile_dpbf16ps(2, 5, 6);
      if (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, row_bytes);
  if (kColumns > 1) _tile_stored(1, c + kTileRows, row_bytes);
  if (kRows > 1) _tile_stored(2, below, row_bytes);
  if (kRows > 1 && kColumns > 1) _tile_stored(3, below + kTileRows, row_bytes);
  memory_barrier();
}
// .. of up to two tiles of rows and of columns.
template <int kParts>
void multiply_tiles(int64_t rows, int64_t columns, const float* a, int64_t stride, const Tiles& b,
                    int64_t tiles, bool accumulate, float* c, int64_t row_bytes) {
  const auto multiply =
      rows > 1      ? columns > 1 ? multiply_tiles<2, 2, kParts> : multiply_tiles<2, 1, kParts>
      : columns > 1 ? multiply_tiles<1, 2, kParts>
                    : multiply_tiles<1, 1, kParts>;
  multiply(a, stride, b, tiles, accumulate, c, row_bytes);
}

// As product(), of rows as left factors are kept, with a depth of k, and packed weights of
// all_blocks blocks. Piece by piece along k: of some rows it stays in the L1 cache for all blocks.
// Scratch has place for the sums of all rows and blocks.
template <int kGates, int kParts, class T, class Wanted, class Fetch, class Finish>
void product_of_tiles(const T* a, Range rows, int64_t k, const T* packed, int64_t all_blocks,
                      Range blocks, bool backwards, T* scratch, const Wanted& wanted,
                      const Fetch& fetch, const Finish& finish) {
  constexpr int kRows = kTilesOfRows * kTileRows, kBlocks = kGates == 1 ? kTileColumns : 1;
  constexpr int64_t kPiece = kTilesOfPiece<kParts>, kGroup = kRows * kBlocks * kGates;
  const InPieces at{tiles_along(k), all_blocks * kGates, kPiece};
  const int pieces = static_cast<int>((at.tiles + kPiece - 1) / kPiece);
  const int64_t groups = (blocks.size() + kBlocks - 1) / kBlocks, stride = row_size<kParts>(k);
  for (int piece = 0; piece < pieces; ++piece) {
    const int64_t first = kPiece * (backwards ? pieces - 1 - piece : piece);
    const int64_t tiles = min(kPiece, at.tiles - first);
    Vec<T>* sum = reinterpret_cast<Vec<T>*>(scratch);
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRows) {
      const int n = static_cast<int>(min(kRows, rows.end - r0));
      const bool some = !all_of({r0, r0 + n}, [&](int64_t row) { return !wanted(row); });
      const T* left = a + (r0 - rows.begin) * stride + first * kParts * kTileRows;
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t block = blocks.begin + kBlocks * (backwards ? groups - 1 - i : i);
        const int some_blocks = static_cast<int>(min(kBlocks, blocks.end - block));
        const int columns = some_blocks * kGates;
        const Range fetched = part(n, piece, pieces);
        for (int64_t row = fetched.begin; row < fetched.end; ++row) {
          for (int j = 0; j < some_blocks; ++j) fetch(r0 + row, block + j);
        }
        const T* w = packed + at(first, block * kGates);
        for (int column = 0; some && column < columns; column += kTileColumns) {
          const Tiles right{w + column * tiles * kTileNumbers, tiles * kTileNumbers};
          multiply_tiles<kParts>(row_tiles(n), columns - column, left, stride, right, tiles,
                                 piece > 0, reinterpret_cast<T*>(sum + column), columns * 64);
        }
        if (piece + 1 == pieces) finish(Tile{r0, block, n, some_blocks}, sum);
        if (pieces > 1) sum += kGroup;
      }
    }
  }
}

// As Outer: a is in split rows, b is rounded.
template <class T>
class OuterOfTiles {
  using Product = OuterProduct<T>;
  static constexpr int64_t kHeight = kTilesOfRows * kTileRows, kColumns = kTileColumns * kTileRows;
  static constexpr int64_t kWidth = 512;  // of N
  static constexpr int64_t kDepth = kTilesOfPiece<2> * kTileDepth;
  // Units of one k by pairs of rows: [2 tiles][tiles][2][16 pairs].
  static constexpr int64_t kStride = row_size<2>(kDepth);

 public:
  static constexpr int64_t kScratch =
      kHeight * kStride + kWidth * kTileChunk + 2 * kHeight * kWidth;  // numbers

  explicit OuterOfTiles(T* scratch)
      : sums_{scratch, scratch + kHeight * kWidth},
        a_(scratch + 2 * kHeight * kWidth),
        b_{a_ + kHeight * kStride, a_ + kHeight * kStride + kWidth * kTileChunk / 2} {}

  // For some tiles of a's depth [G][blocks of H]; there are at most kTileChunk rows.
  void add(const T* a, int64_t gates, int64_t h, Range of_depth, const Rows& rows,
           const Product (&products)[2]) const {
    const int64_t stride = row_size<2>(gates * blocks_of<T>(h) * kTileRows);
    // Rows beyond the last one are those of b that are zeros.
    const T* places[kTileChunk];
    for (int64_t i = 0; i < tiles_along(rows.count) * kTileDepth; ++i) {
      places[i] = a + rows[min(i, rows.count - 1)] * stride;
    }
    int64_t most = 0;
    for (const Product& p : products) most = p.c && p.n > most ? p.n : most;
    for (int64_t n0 = 0; n0 < most; n0 += kWidth) {
      for (int j = 0; j < 2; ++j) pack_b(products[j], columns(products[j], n0), rows, b_[j]);
      for (int64_t tile = of_depth.begin; tile < of_depth.end; ++tile) {
        for (int64_t k0 = 0; k0 < rows.count; k0 += kDepth) {
          const int64_t tiles = tiles_along(min(rows.count - k0, kDepth));
          pack_a(places + k0, tile * 2 * kTileRows, tiles);
          for (int j = 0; j < 2; ++j) {
            const Range some = columns(products[j], n0);
            const InPieces at{tiles_along(rows.count), blocks_of<T>(some.size()), kTilesOfPiece<2>};
            multiply(a_, some, tiles, b_[j] + at(k0 / kTileDepth, 0), k0 > 0, sums_[j]);
          }
        }
        for (int j = 0; j < 2; ++j) {
          add_sums(products[j], gates, h, tile, columns(products[j], n0), sums_[j]);
        }
      }
    }
  }

 private:
  static Range columns(const Product& p, int64_t n0) {
    return {n0, p.c && n0 < p.n ? min(p.n, n0 + kWidth) : n0};
  }

  static void pack_b(const Product& p, Range columns, const Rows& rows, T* to) {
    const auto load = [&](int64_t i, int64_t column) {
      if (i >= rows.count) return Vec<T>{};
      const int64_t at = columns.begin + column, n = columns.size() - column;
      const Vec<T> values = load_some(p.b + rows[i] * p.n + at, n);
      return p.scale ? values * load_some(p.scale + rows[i] % p.period * p.n + at, n) : values;
    };
    const Range blocks{0, blocks_of<T>(columns.size())};
    pack_columns_of_tiles(rows.count, columns.size(), blocks, load, to);
  }

  // 32 units of rows at the given places, as many as whole tiles take.
  void pack_a(const T* const* rows, int64_t offset, int64_t tiles) const {
    for (int64_t tile = 0; tile < tiles; ++tile, rows += kTileDepth) {
      // Short runs that no hardware foresees.
      for (int i = 0; i < kTileDepth && tile + 1 < tiles; ++i) {
        __builtin_prefetch(rows[kTileDepth + i] + offset);
        __builtin_prefetch(rows[kTileDepth + i] + offset + kTileRows);
      }
      for (int part = 0; part < 2; ++part) {
        T* to = a_ + (tile * 2 + part) * kTileRows;
        pack_half<0>(rows, offset + part * kTileRows, to);
        pack_half<16>(rows, offset + part * kTileRows, to + kTileRows * kStride);
      }
    }
  }
  template <int kFirst>
  static void pack_half(const T* const* rows, int64_t offset, T* to) {
    Vec<T> tile[kTileRows];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      tile[i] = in_turn<kFirst, kFirst>(frnn::load<Vec<T>>(rows[2 * i] + offset),
                                        frnn::load<Vec<T>>(rows[2 * i + 1] + offset));
    }
    transpose_tile(tile);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) frnn::store(to + i * kStride, tile[i]);
  }

  // The sums of a piece for all columns, [columns / 32][32][32].
  static void multiply(const T* a, Range columns, int64_t tiles, const T* b, bool accumulate,
                       T* sums) {
    for (int64_t j = 0; j < columns.size(); j += kColumns, sums += kHeight * kColumns) {
      multiply_tiles<2>(kTilesOfRows, row_tiles(columns.size() - j), a, kStride,
                        {b + j / kTileRows * tiles * kTileNumbers, tiles * kTileNumbers}, tiles,
                        accumulate, sums, kColumns * 4);
    }
  }

  // Row by row, in order of memory.
  static void add_sums(const Product& p, int64_t gates, int64_t h, int64_t tile, Range columns,
                       const T* sums) {
    const int64_t blocks = blocks_of<T>(h);
    for (int64_t i = 0; i < kHeight; ++i, sums += kColumns) {
      const int64_t block = tile * 2 + i / kTileRows, gate = block / blocks;
      const int64_t u = block % blocks * kTileRows + i % kTileRows;
      if (gate >= gates || u >= h) continue;
      T* c = p.c + (gate * h + u) * p.n + columns.begin;
      for (int64_t j = 0; j < columns.size(); j += kTileRows) {
        const int n = static_cast<int>(min(kTileRows, columns.size() - j));
        const Vec<T> more =
            frnn::load<Vec<T>>(sums + j / kColumns * kHeight * kColumns + j % kColumns);
        frnn::store(c + j, frnn::load<Vec<T>>(c + j, n) + more, n);
      }
    }
  }

  T* const sums_[2];
  T* const a_;     // packed
  T* const b_[2];  // packed
};
