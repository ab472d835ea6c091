// SPDX-License-Identifier: Apache-2.0
// Products of a few rows with packed weights. Included by recurrence.inl inside an anonymous
// namespace, so that every instruction set has its own copy.
//
// Packed weights are [blocks][K][G][V]: a block is one vector of output units, V its lanes. The
// gates of a unit lie together, so that the cell can follow the product without a detour through
// memory, and a block is read from front to back.

template <class T>
using Vec = frnn::Vector<T, kVectorBytes / sizeof(T)>;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr int64_t blocks_of(int64_t units) {
  return (units + kLanes<T> - 1) / kLanes<T>;
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

template <class F>
bool all_of(Range range, const F& holds) {
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (!holds(i)) return false;
  }
  return true;
}

// Rows of an array: all of them in order, or those that are named.
struct Rows {
  const int* names;  // or null
  int64_t count;
  int64_t first = 0;  // from which they count

  int64_t operator[](int64_t i) const { return first + (names ? names[i] : i); }
  // A piece of them.
  Rows from(int64_t begin, int64_t size) const {
    return names ? Rows{names + begin, size, first} : Rows{nullptr, size, first + begin};
  }
};

// Part i of n nearly equal parts of [0, total).
constexpr Range part(int64_t total, int i, int n) { return {total * i / n, total * (i + 1) / n}; }

// The square of kLanes vectors of kLanes, transposed: in turn halves, quarters, .. of the vectors
// change places with those of the vector as far away.
template <int kDistance, class T, int... kLane>
void exchange(Vec<T> (&x)[kLanes<T>], std::integer_sequence<int, kLane...> lanes) {
  constexpr int kAll = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < kAll; ++i) {
    if (i & kDistance) continue;
    const Vec<T> a = x[i], b = x[i + kDistance];
    x[i] = frnn::shuffle<(kLane & kDistance ? kAll + kLane - kDistance : kLane)...>(a, b);
    x[i + kDistance] =
        frnn::shuffle<(kLane & kDistance ? kAll + kLane : kLane + kDistance)...>(a, b);
  }
  if constexpr (kDistance > 1) exchange<kDistance / 2, T>(x, lanes);
}

// w [G*N, K], units along rows -> the given blocks of packed. Lanes beyond N become 0.
template <class T>
void pack_rows(const T* w, int gates, int64_t units, int64_t k, Range blocks, T* packed) {
  constexpr int kLane = kLanes<T>;
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    T* to = packed + block * k * gates * kLane;
    const int64_t u = block * kLane;
    const int64_t n = min(kLane, units - u);
    for (int64_t k0 = 0; k0 < k; k0 += kLane) {
      const int some = static_cast<int>(min(kLane, k - k0));
      for (int g = 0; g < gates; ++g) {
        Vec<T> square[kLane] = {};
        for (int64_t lane = 0; lane < n; ++lane) {
          square[lane] = frnn::load<Vec<T>>(w + (g * units + u + lane) * k + k0, some);
        }
        if constexpr (kLane > 1) {
          exchange<kLane / 2, T>(square, std::make_integer_sequence<int, kLane>{});
        }
        for (int i = 0; i < some; ++i) {
          frnn::store(to + ((k0 + i) * gates + g) * kLane, square[i]);
        }
      }
    }
  }
}

// w [.., ldw], units along columns, one gate, its rows along k -> the given blocks of packed.
template <class T>
void pack_columns(const T* w, int64_t ldw, int64_t units, const Rows& rows, Range blocks,
                  T* packed) {
  constexpr int64_t kStrip = 8;  // written to a block at a time, in whole cache lines
  const int64_t k = rows.count;
  for (int64_t k0 = 0; k0 < k; k0 += kStrip) {
    const int64_t k1 = min(k, k0 + kStrip);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t u = block * kLanes<T>;
      const int n = static_cast<int>(min(kLanes<T>, units - u));
      T* to = packed + block * k * kLanes<T>;
      for (int64_t i = k0; i < k1; ++i) {
        frnn::store(to + i * kLanes<T>, frnn::load<Vec<T>>(w + rows[i] * ldw + u, n));
      }
    }
  }
}

// sum[row][block][gate] (+)= a[row][0..k) . w[block][0..k)[gate], where a[row][i] is at
// a[row * lda + i * step], for the rows that are named or, in order, from the first of them on.
// Meanwhile k lines of weights at `ahead` are fetched into the L2 cache.
template <class T>
using Multiply = void (*)(const T* a, int64_t lda, int64_t step, const int* names, int64_t k,
                          const T* w, int64_t block_stride, const T* ahead, bool accumulate,
                          Vec<T>* sum);

// What a block holds per k is this many cache lines, begun ones included, of kAheadStep numbers.
template <int kGates, class T>
constexpr int kAheadLines = (kGates * kVectorBytes + 63) / 64;
template <int kGates, class T>
constexpr int kAheadStep = kGates * kLanes<T> / kAheadLines<kGates, T>;

// The microkernel. All sums stay in registers, and of the rows and the weights the fewer, which
// leaves one register for the others in turn. Two k at a time: fewer other instructions lie among
// the multiplications.
template <int kRows, int kBlocks, int kGates, bool kNamed, class T>
void multiply(const T* __restrict__ a, int64_t lda, int64_t step, const int* names, int64_t k,
              const T* __restrict__ w, int64_t block_stride, const T* ahead, bool accumulate,
              Vec<T>* __restrict__ sum) {
  constexpr int kVectors = kBlocks * kGates;
  constexpr bool kByRows = kRows > kVectors;
  constexpr int kOuter = kByRows ? kRows : kVectors, kInner = kByRows ? kVectors : kRows;
  Vec<T> acc[kRows][kVectors] = {};
  [[maybe_unused]] int64_t named[kRows];
  if constexpr (kNamed) {
    for (int row = 0; row < kRows; ++row) named[row] = (names[row] - names[0]) * lda;
  }
  a += names[0] * lda;
  if constexpr (!kNamed) sum += names[0] * int64_t{kVectors};
#pragma GCC unroll 2
  for (int64_t i = 0; i < k; ++i) {
    if (kRows > 1) __builtin_prefetch(ahead + i * kAheadStep<kGates, T>, 0, 2);
#pragma GCC unroll 16
    for (int outer = 0; outer < kOuter; ++outer) {
#pragma GCC unroll 16
      for (int inner = 0; inner < kInner; ++inner) {
        const int row = kByRows ? outer : inner, v = kByRows ? inner : outer;
        const T* p = w + v / kGates * block_stride + (i * kGates + v % kGates) * kLanes<T>;
        const T value = a[(kNamed ? named[row] : row * lda) + i * step];
        acc[row][v] += value * frnn::load<Vec<T>>(p);
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kVectors; ++i) {
    const Vec<T> value = acc[i / kVectors][i % kVectors];
    if constexpr (kNamed) {
      Vec<T>& to = sum[names[i / kVectors] * int64_t{kVectors} + i % kVectors];
      to = accumulate ? to + value : value;
    } else {
      sum[i] = accumulate ? sum[i] + value : value;
    }
  }
}

// Shapes of the microkernel for a number of gates: about four vectors of weights, which is where
// weights and rows take turns best, and as many rows as fit. With a single row the weights are read
// only once, so more blocks at a time take the place of rows.
template <int kGates>
struct Shape {
  static constexpr int kBlocks = kGates == 1 ? 4 : 1;
  static constexpr int kBlocksOfOneRow = kGates >= 8 ? 1 : 8 / kGates;
};
template <int kVectors>
constexpr int kRowsOf = kSumRegisters / kVectors < 6 ? kSumRegisters / kVectors : 6;

template <int kBlocks, int kGates, bool kNamed, class T>
struct MultiplyTable {
  Multiply<T> entry[kRowsOf<kBlocks * kGates>];  // by rows - 1

  template <int... kIndex>
  static constexpr MultiplyTable make(std::integer_sequence<int, kIndex...>) {
    return {{&multiply<kIndex + 1, kBlocks, kGates, kNamed, T>...}};
  }
};

// K is worked off in chunks so that the chunk of weights all rows share stays in the L1 cache
// (16 KB with AVX2 and 4 gates), and long sums are added in parts, which keeps them accurate. It
// is a constant so that results do not depend on how the work is divided.
constexpr int64_t kChunk = 128;
// Rows whose sums are kept at a time, fewer than the bits of a mask; and all their names.
constexpr int kRowBlock = 48;
constexpr struct Numbers {
  int value[kRowBlock];
  constexpr Numbers() : value() {
    for (int i = 0; i < kRowBlock; ++i) value[i] = i;
  }
} kNumbers;

// sum[row][block][gate] over all of K, for kBlocks blocks at w, for the rows in `wanted` alone.
// The weights at `next` are wanted next: while the tiles of a chunk are worked off they fetch the
// chunk after it, as many lines each as they have k, so that what does not fit the L2 cache is
// there when it is used (a single row leaves no time for that). Before each tile of a chunk comes
// its part of fetch(row, block).
template <int kBlocks, int kGates, class T, class Fetch>
void multiply_rows(const T* a, int64_t lda, int rows, uint64_t wanted, int64_t k, const T* w,
                   const T* next, const Fetch& fetch, Vec<T>* sum) {
  constexpr int kRows = kRowsOf<kBlocks * kGates>;
  constexpr std::make_integer_sequence<int, kRows> kSizes;
  static constexpr auto kInOrder = MultiplyTable<kBlocks, kGates, false, T>::make(kSizes);
  static constexpr auto kNamed = MultiplyTable<kBlocks, kGates, true, T>::make(kSizes);
  const int64_t stride = k * kGates * kLanes<T>;  // from block to block
  const bool all = wanted == (uint64_t{1} << rows) - 1;
  const auto& table = all ? kInOrder.entry : kNamed.entry;
  int some[kRowBlock], count = all ? rows : 0;
  for (int row = 0; row < rows && !all; ++row) {
    if (wanted >> row & 1) some[count++] = row;
  }
  const int* const names = all ? kNumbers.value : some;
  const int tiles = (count + kRows - 1) / kRows;
  const int parts = tiles * static_cast<int>((k + kChunk - 1) / kChunk);
  for (int64_t k0 = 0; k0 < k; k0 += kChunk) {
    const int64_t k1 = min(k, k0 + kChunk);
    const T* ahead = k1 < k ? w + k1 * kGates * kLanes<T> : next;
    for (int tile = 0; tile < tiles; ++tile) {
      const Range r = part(count, tile, tiles);
      const Range places =
          part(rows * kBlocks, static_cast<int>(k0 / kChunk) * tiles + tile, parts);
      for (int64_t i = places.begin; i < places.end; ++i) fetch(i / kBlocks, i % kBlocks);
      const int line = tile % kAheadLines<kGates, T>,
                block = tile / kAheadLines<kGates, T> % kBlocks;
      table[r.size() - 1](a + k0, lda, 1, names + r.begin, k1 - k0, w + k0 * kGates * kLanes<T>,
                          stride, ahead + block * stride + line * (k1 - k0) * kAheadStep<kGates, T>,
                          k0 > 0, sum);
    }
  }
}

// a . w[lane] for the first n rows of w [.., K], 0 in the other lanes.
template <class T>
Vec<T> dot_products(const T* __restrict__ a, const T* __restrict__ w, int64_t k, int n) {
  constexpr int kLane = kLanes<T>;
  Vec<T> partial[kLane] = {};
  for (int64_t i = 0; i < k; i += kLane) {
    const int some = static_cast<int>(min(kLane, k - i));
    const Vec<T> values = frnn::load<Vec<T>>(a + i, some);
#pragma GCC unroll 16
    for (int lane = 0; lane < kLane; ++lane) {
      const T* row = w + (lane < n ? lane : 0) * k;
      partial[lane] += values * frnn::load<Vec<T>>(row + i, some);
    }
  }
  Vec<T> sum;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLane; ++lane) {
    T total = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) total += partial[lane][i];
    sum[lane] = lane < n ? total : T(0);
  }
  return sum;
}

// Weights that were packed beforehand. A product asks for some blocks of them, and for those that
// it will take after these.
template <class T>
struct Packed {
  const T* data;
  int64_t size;  // of a block

  const T* get(int64_t block, int) const { return data + block * size; }
  const T* next(const T* w, int64_t blocks) const { return w + blocks * size; }
};

// Weights w [G*N, K] that a single product needs: it packs each block when its turn comes, to a
// place that stays in the cache.
template <class T>
struct PackedOnce {
  const T* w;
  int gates;
  int64_t units, k;
  T* place;  // for the most blocks at a time

  const T* get(int64_t block, int count) const {
    const Range blocks{block, block + count};
    pack_rows(w, gates, units, k, blocks, place - block * k * gates * kLanes<T>);
    return place;
  }
  const T* next(const T* packed, int64_t) const { return packed; }
};

// Some rows and blocks of a product.
struct Tile {
  int64_t row, block;  // the first ones
  int rows, blocks;
};

// How the cells of a row go on after a product: with nothing to ask, not at all, or otherwise.
enum class Kind { kPlain, kIdle, kOther };

// Calls finish(some, kind, sums before them) for all of a tile, as much at a time as is of one
// kind. Those are plain that kind_of(row) says are, in blocks before `whole`.
template <class KindOf, class Finish>
void by_kind(const Tile& tile, int64_t whole, const KindOf& kind_of, const Finish& finish) {
  const bool mixed = tile.block < whole && tile.block + tile.blocks > whole;
  for (int i = 0, n = 0; i < tile.rows; i += n) {
    Kind kind = kind_of(tile.row + i);
    n = 1;
    while (i + n < tile.rows && kind_of(tile.row + i + n) == kind) ++n;
    if (kind == Kind::kPlain && tile.block >= whole) kind = Kind::kOther;
    if (kind == Kind::kPlain && mixed) {
      for (int k = 0; k < n * tile.blocks; ++k) {
        const Tile one{tile.row + i + k / tile.blocks, tile.block + k % tile.blocks, 1, 1};
        finish(one, one.block < whole ? kind : Kind::kOther, i * tile.blocks + k);
      }
    } else {
      finish(Tile{tile.row + i, tile.block, n, tile.blocks}, kind, i * tile.blocks);
    }
  }
}

// Blocks a product takes at a time, at most.
template <int kGates>
constexpr int kMostBlocks =
    Shape<kGates>::kBlocks > Shape<kGates>::kBlocksOfOneRow ? Shape<kGates>::kBlocks
                                                            : Shape<kGates>::kBlocksOfOneRow;

// Runs the product of rows a [.., lda] with packed blocks and hands the sums over, tile by tile:
// finish(tile, sum[row][block][gate]). fetch(row, block), in the course of the product, is
// the time to prefetch what finish will use. wanted(row) tells whether the row's sums
// matter; if not they are unspecified. `backwards` walks the blocks from the end: alternating it
// from step to step finds the blocks used last still in the cache.
template <int kGates, class T, class Weights, class Wanted, class Fetch, class Finish>
void product(const T* a, int64_t lda, Range rows, int64_t k, const Weights& weights, Range blocks,
             bool backwards, const Wanted& wanted, const Fetch& fetch, const Finish& finish) {
  using S = Shape<kGates>;
  alignas(64) Vec<T> sum[kRowBlock * kMostBlocks<kGates> * kGates];
  const auto some_blocks = [&]<int kBlocks>(int64_t block) {
    const T* w = weights.get(block, kBlocks);
    const T* next = weights.next(w, backwards ? -kBlocks : kBlocks);
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRowBlock) {
      const int n = static_cast<int>(min(kRowBlock, rows.end - r0));
      uint64_t mask = 0;
      for (int i = 0; i < n; ++i) mask |= uint64_t{wanted(r0 + i)} << i;
      const auto fetch_place = [&](int64_t i, int64_t j) { fetch(r0 + i, block + j); };
      multiply_rows<kBlocks, kGates, T>(a + r0 * lda, lda, n, mask, k, w, next, fetch_place, sum);
      finish(Tile{r0, block, n, kBlocks}, sum);
    }
  };
  const int step = rows.size() == 1 ? S::kBlocksOfOneRow : S::kBlocks;
  const int64_t groups = blocks.size() / step;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t block = blocks.begin + step * (backwards ? groups - 1 - i : i);
    if (rows.size() == 1) {
      some_blocks.template operator()<S::kBlocksOfOneRow>(block);
    } else {
      some_blocks.template operator()<S::kBlocks>(block);
    }
  }
  for (int64_t block = blocks.begin + step * groups; block < blocks.end; ++block) {
    some_blocks.template operator()<1>(block);
  }
}

// The same with weights as they are, w [G*N, K]: for so few rows that packing would cost more than
// the product. The lanes of a sum run along K here.
template <int kGates, class T, class Wanted, class Finish>
void product_unpacked(const T* a, int64_t lda, Range rows, int64_t k, const T* w, int64_t units,
                      Range blocks, const Wanted& wanted, const Finish& finish) {
  constexpr int kLane = kLanes<T>;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int gates = wanted(row) ? kGates : 0;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      Vec<T> sum[kGates] = {};
      for (int gate = 0; gate < gates; ++gate) {
        const int64_t n = min(kLane, units - block * kLane);
        const T* first = w + (gate * units + block * kLane) * k;
        sum[gate] = dot_products(a + row * lda, first, k, static_cast<int>(n));
      }
      finish(Tile{row, block, 1, 1}, sum);
    }
  }
}
