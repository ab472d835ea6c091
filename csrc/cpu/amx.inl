// SPDX-License-Identifier: Apache-2.0
// AMX tiles, and factors packed for them. Included by recurrence.inl inside an anonymous
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

// If limited, the largest numbers take the place of infinite ones, of which there are no parts.
template <bool kLimited>
Sums limited(Sums x) {
  constexpr float kMost = 0x1.fep127f;
  if (!kLimited) return x;
  x = x > kMost ? frnn::broadcast<Sums>(kMost) : x;
  return x < -kMost ? frnn::broadcast<Sums>(-kMost) : x;
}

// The parts of 16 or 32 numbers.
FRNN_FN void make_parts(Sums x, __m256i (&parts)[1]) { parts[0] = frnn::rounded(x); }
FRNN_FN void make_parts(Sums x, __m256i (&parts)[3]) {
  const frnn::Parts all(x);
  for (int i = 0; i < 3; ++i) parts[i] = all.part[i];
}
FRNN_FN void make_parts(Sums low, Sums high, __m512i (&parts)[1]) {
  parts[0] = frnn::rounded(low, high);
}
FRNN_FN void make_parts(Sums low, Sums high, __m512i (&parts)[3]) {
  const frnn::PartsOfTwo all(low, high);
  for (int i = 0; i < 3; ++i) parts[i] = all.part[i];
}

// .. of the first n of them, zeros for the rest.
template <bool kLimited = false>
void load_parts(const BFloat16* p, int64_t n, __m256i (&parts)[1]) {
  parts[0] = load_half(p, n);
}
template <bool kLimited = false>
void load_parts(const float* p, int64_t n, __m256i (&parts)[3]) {
  make_parts(limited<kLimited>(load_half(p, n)), parts);
}
template <bool kLimited = false>
void load_some(const BFloat16* p, int64_t n, __m512i (&parts)[1]) {
  const auto mask = static_cast<__mmask32>(n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0);
  parts[0] = _mm512_maskz_loadu_epi16(mask, p);
}
template <bool kLimited = false>
void load_some(const float* p, int64_t n, __m512i (&parts)[3]) {
  make_parts(limited<kLimited>(load_half(p, n)), limited<kLimited>(load_half(p + 16, n - 16)),
             parts);
}

// The numbers of two in turn: pairs along k.
inline __m512i in_pairs(__m256i even, __m256i odd) {
  return frnn::lower_halves(even) | frnn::upper_halves(odd);
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

// Some rows of a [.., lda], limited -> rows from `first` on.
template <class S>
void lay_rows(const S* a, int64_t lda, const Rows& rows, int64_t k, const LeftFactor& to,
              int64_t first) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const S* from = a + rows[i] * lda;
    for (int64_t k0 = 0; k0 < k; k0 += kTileDepth) {
      __m512i parts[kParts<S>];
      load_some<true>(from + k0, k - k0, parts);
      BFloat16* place = to.at<S>(first + i, k0);
      for (int j = 0; j < kParts<S>; ++j) _mm512_storeu_si512(place + j * to.part, parts[j]);
    }
  }
}

// Some blocks of a row of units -> a row of a left factor. What is beyond the last block in its
// tile is cleared.
template <bool kLimited, class S>
void lay_blocks(const S* a, int64_t units, Range blocks, const LeftFactor& to, int64_t row) {
  const auto lay_half = [&](int64_t unit) {
    __m256i parts[kParts<S>];
    load_parts<kLimited>(a + unit, units - unit, parts);
    BFloat16* place = to.at<S>(row, unit);
    for (int i = 0; i < kParts<S>; ++i) frnn::store_halves(place + i * to.part, parts[i], 16);
  };
  const auto lay_whole = [&](int64_t unit) {
    __m512i parts[kParts<S>];
    load_some<kLimited>(a + unit, units - unit, parts);
    BFloat16* place = to.at<S>(row, unit);
    for (int i = 0; i < kParts<S>; ++i) _mm512_storeu_si512(place + i * to.part, parts[i]);
  };
  int64_t block = blocks.begin;
  if (block < blocks.end && block % 2 == 1) lay_half(block++ * kTileRows);
  for (; block < blocks.end; block += 2) {
    const bool alone = block + 1 == blocks.end && (block + 1) * kTileRows < units;
    alone ? lay_half(block * kTileRows) : lay_whole(block * kTileRows);
  }
}

// Some vectors of a row of a left factor. If they are its last ones, the rest of their tile is
// cleared.
template <class S, int kVectors>
FRNN_FN void lay_vectors(const Sums* values, const LeftFactor& to, int64_t row, int64_t k,
                         bool last) {
  if constexpr (kVectors % 2 == 0) {
    for (int i = 0; i < kVectors; i += 2, k += kTileDepth) {
      __m512i parts[kParts<S>];
      make_parts(values[i], values[i + 1], parts);
      BFloat16* place = to.at<S>(row, k);
      for (int j = 0; j < kParts<S>; ++j) _mm512_storeu_si512(place + j * to.part, parts[j]);
    }
  } else {
    for (int i = 0; i < kVectors || (last && k % kTileDepth != 0); ++i, k += kTileRows) {
      __m256i parts[kParts<S>];
      make_parts(i < kVectors ? values[i] : Sums{}, parts);
      BFloat16* place = to.at<S>(row, k);
      for (int j = 0; j < kParts<S>; ++j) frnn::store_halves(place + j * to.part, parts[j], 16);
    }
  }
}

// ---- Right factors: tiles, each with all its parts, in pieces along k, each of all columns.

template <class S>
struct InPieces {
  int64_t tiles, columns;           // tiles along k, and of columns
  int64_t depth = kTilesAtOnce<S>;  // tiles along k of a piece

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
