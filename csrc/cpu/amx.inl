// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 values on AMX tiles, with sums in float32. Included by recurrence.inl inside
// an anonymous namespace, in the translation unit that is compiled for AMX.
//
// A tile is 16 rows of 64 bytes. One of the rows' factor holds 16 of them by 32 of k; one of the
// weights holds 16 pairs of k by 16 units. Both are packed tile by tile, along k. The instructions
// take subnormal values for zeros.

constexpr int kTileRows = 16, kTileDepth = 32, kTileValues = kTileRows * kTileDepth;

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

// 32 values from p on, zeros from the n-th on, as pairs of bfloat16.
inline Vec<float> load_pairs(const float* p, int64_t n) {
  const int low = static_cast<int>(min(n, 16)), high = static_cast<int>(min(n - low, 16));
  const Vec<float> first = frnn::load<Vec<float>>(p, low);
  const Vec<float> second = high > 0 ? frnn::load<Vec<float>>(p + 16, high) : Vec<float>{};
  return __builtin_bit_cast(Vec<float>, _mm512_cvtne2ps_pbh(__builtin_bit_cast(__m512, second),
                                                            __builtin_bit_cast(__m512, first)));
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
        Vec<T> square[kTileRows] = {};
        for (int64_t lane = 0; lane < n; ++lane) {
          square[lane] = load_pairs(w + (g * units + u + lane) * k + k0, k - k0);
        }
        exchange<kTileRows / 2, T>(square, std::make_integer_sequence<int, kTileRows>{});
        for (int i = 0; i < kTileRows; ++i) frnn::store(to + i * kTileRows, square[i]);
      }
    }
  }
}

// c[16 * kRowTiles rows][gate] = a . w, both packed; the gates are kGates at w.
template <int kRowTiles, int kGates>
void multiply_tiles(const float* a, const float* w, int64_t tiles, float* c, int64_t row_bytes) {
  static_assert(kRowTiles <= 2 && kGates <= 2);
  const int64_t size = tiles * kTileNumbers;
  memory_barrier();
  _tile_zero(0);
  if (kGates > 1) _tile_zero(1);
  if (kRowTiles > 1) _tile_zero(2);
  if (kRowTiles > 1 && kGates > 1) _tile_zero(3);
  for (int64_t i = 0; i < size; i += kTileNumbers) {
    _tile_loadd(4, a + i, 64);
    if (kRowTiles > 1) _tile_loadd(5, a + size + i, 64);
    _tile_loadd(6, w + i, 64);
    if (kGates > 1) _tile_loadd(7, w + size + i, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kGates > 1) _tile_dpbf16ps(1, 4, 7);
    if (kRowTiles > 1) _tile_dpbf16ps(2, 5, 6);
    if (kRowTiles > 1 && kGates > 1) _tile_dpbf16ps(3, 5, 7);
  }
  float* below = c + kTileRows * row_bytes / 4;
  _tile_stored(0, c, row_bytes);
  if (kGates > 1) _tile_stored(1, c + kTileRows, row_bytes);
  if (kRowTiles > 1) _tile_stored(2, below, row_bytes);
  if (kRowTiles > 1 && kGates > 1) _tile_stored(3, below + kTileRows, row_bytes);
  memory_barrier();
}

// As product(), of rows that are rounded to bfloat16 and weights from pack_tiles.
template <int kGates, class T, class Wanted, class Fetch, class Finish>
void product_of_tiles(const T* a, int64_t lda, Range rows, int64_t k, const T* packed, Range blocks,
                      bool backwards, T* scratch, const Wanted& wanted, const Fetch& fetch,
                      const Finish& finish) {
  constexpr int kRows = 2 * kTileRows;
  constexpr int64_t kRowBytes = kGates * 64;
  const int64_t tiles = tiles_along(k), size = tiles * kTileNumbers;
  for (int64_t row = rows.begin; row < rows.begin + row_tiles(rows.size()) * kTileRows; ++row) {
    const int64_t r = row - rows.begin;
    T* to = scratch + r / kTileRows * size + r % kTileRows * kTileRows;
    for (int64_t k0 = 0; k0 < k; k0 += kTileDepth, to += kTileNumbers) {
      frnn::store(to, row < rows.end ? load_pairs(a + row * lda + k0, k - k0) : Vec<T>{});
    }
  }
  alignas(64) Vec<T> sum[kRows * kGates];
  T* const c = reinterpret_cast<T*>(sum);
  for (int64_t i = 0; i < blocks.size(); ++i) {
    const int64_t block = backwards ? blocks.end - 1 - i : blocks.begin + i;
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRows) {
      const int n = static_cast<int>(min(kRows, rows.end - r0));
      bool some = false;
      for (int row = 0; row < n; ++row) {
        some |= wanted(r0 + row);
        fetch(r0 + row, block);
      }
      const T* from = scratch + (r0 - rows.begin) / kTileRows * size;
      for (int g = 0; some && g < kGates; g += 2) {
        const T* w = packed + (block * kGates + g) * size;
        const bool pair = g + 1 < kGates;
        const auto multiply = n > kTileRows ? pair ? multiply_tiles<2, 2> : multiply_tiles<2, 1>
                              : pair        ? multiply_tiles<1, 2>
                                            : multiply_tiles<1, 1>;
        multiply(from, w, tiles, c + g * kTileRows, kRowBytes);
      }
      finish(Tile{r0, block, n, 1}, sum);
    }
  }
}
