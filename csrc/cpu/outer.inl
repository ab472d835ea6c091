// SPDX-License-Identifier: Apache-2.0
// Sums of outer products over many rows: gradients of weights. Included by recurrence.inl inside an
// anonymous namespace.
//
// Both factors are packed piece by piece, so that what the microkernel reads comes from the L1 and
// L2 caches (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008). Each
// sum is formed in the same order however the units are divided.

// c [M, N] += a' b for rows of a [.., M] and of b [.., N].
template <class S, class T = S>
struct OuterProduct {
  const S* b;
  int64_t n;
  T* c;                      // null: not wanted
  const T* scale = nullptr;  // [period, N], or null: what row r of b is multiplied by, at r %
                             // period
  int64_t period = 1;
};

template <class T>
class Outer {
  using V = Vec<T>;
  using Product = OuterProduct<T>;
  static constexpr int kBlocks = Shape<1>::kBlocks, kRows = kRowsOf<kBlocks>;
  static constexpr int64_t kHeight = 96;  // of M: a piece of a is a part of L2
  static constexpr int64_t kWidth = 256;  // of N: a piece of each b is packed for all of M
  static_assert(kHeight % kRows == 0);

 public:
  static constexpr int64_t kDepth = 256;  // of K: more, and four blocks of b leave the L1 cache
  static constexpr int64_t kScratch = (kHeight + 2 * kWidth) * kDepth;  // numbers

  explicit Outer(T* scratch)
      : a_(scratch), b_{a_ + kHeight * kDepth, a_ + (kHeight + kWidth) * kDepth} {}

  // For the units of M, both products, which share a.
  void add(const T* a, int64_t m, Range units, const Rows& rows,
           const Product (&products)[2]) const {
    int64_t most = 0;
    for (const Product& p : products) most = p.c && p.n > most ? p.n : most;
    for (int64_t k0 = 0; k0 < rows.count; k0 += kDepth) {
      const int64_t depth = min(rows.count - k0, kDepth);
      const Rows piece = rows.from(k0, depth);
      for (int64_t n0 = 0; n0 < most; n0 += kWidth) {
        for (int j = 0; j < 2; ++j) pack_b(products[j], piece, columns(products[j], n0), b_[j]);
        for (int64_t m0 = units.begin; m0 < units.end; m0 += kHeight) {
          const Range some{m0, min(units.end, m0 + kHeight)};
          pack_a(a, m, some, piece);
          for (int j = 0; j < 2; ++j) {
            add_block(products[j], some, columns(products[j], n0), depth, b_[j]);
          }
        }
      }
    }
  }

 private:
  static Range columns(const Product& p, int64_t n0) {
    return {n0, p.c && n0 < p.n ? min(p.n, n0 + kWidth) : n0};
  }

  static void pack_b(const Product& p, const Rows& rows, Range columns, T* to) {
    if (columns.size() == 0) return;
    const Range blocks{0, blocks_of<T>(columns.size())};
    pack_columns(p.b + columns.begin, p.n, columns.size(), rows, blocks, to);
    if (p.scale == nullptr) return;
    for (int64_t i = 0; i < rows.count; ++i) {
      const T* scale = p.scale + rows[i] % p.period * p.n + columns.begin;
      for (int64_t block = 0; block < blocks.end; ++block) {
        const int64_t u = block * kLanes<T>;
        const int n = static_cast<int>(min(kLanes<T>, columns.size() - u));
        T* at = to + (block * rows.count + i) * kLanes<T>;
        frnn::store(at, frnn::load<V>(at) * frnn::load<V>(scale + u, n));
      }
    }
  }

  // Rows of a [.., M] -> [units / kRows][rows][kRows]
  void pack_a(const T* all, int64_t m, Range units, const Rows& rows) const {
    constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);  // short runs that no hardware foresees
    const int64_t k = rows.count;
    T* to = a_;
    for (int64_t i = 0; i < k; ++i, to += kRows) {
      const T* a = all + rows[i] * m;
      if (i + kAhead < k) {
        const T* ahead = all + rows[i + kAhead] * m;
        for (int64_t unit = units.begin; unit < units.end; unit += kLine) {
          __builtin_prefetch(ahead + unit);
        }
      }
      int64_t unit = units.begin;
      for (T* tile = to; unit < units.end; unit += kRows, tile += k * kRows) {
        if (unit + kRows <= units.end) {
          __builtin_memcpy(tile, a + unit, kRows * sizeof(T));
        } else {
          __builtin_memcpy(tile, a + unit, (units.end - unit) * sizeof(T));
        }
      }
    }
  }

  void add_block(const Product& p, Range units, Range columns, int64_t k, const T* b) const {
    const int64_t blocks = blocks_of<T>(columns.size());
    int64_t block = 0;
    for (; block + kBlocks <= blocks; block += kBlocks)
      add_panel<kBlocks>(p, units, columns, k, block, b);
    for (; block < blocks; ++block) add_panel<1>(p, units, columns, k, block, b);
  }

  template <int kSome>
  void add_panel(const Product& p, Range units, Range columns, int64_t k, int64_t block,
                 const T* b) const {
    static constexpr auto kTable =
        MultiplyTable<kSome, 1, false, T>::make(std::make_integer_sequence<int, kRows>{});
    constexpr int kFirst = 0;
    const int64_t column = columns.begin + block * kLanes<T>, size = k * kLanes<T>;
    const T* a = a_;
    V sum[kRows * kSome];
    for (int64_t unit = units.begin; unit < units.end; unit += kRows, a += kRows * k) {
      const int n = static_cast<int>(min(kRows, units.end - unit));
      T* c = p.c + unit * p.n + column;
      for (int i = 0; i < n; ++i) {
        __builtin_prefetch(c + i * p.n, 1);
        __builtin_prefetch(c + i * p.n + kSome * kLanes<T> - 1, 1);
      }
      kTable.entry[n - 1](a, 1, kRows, &kFirst, k, b + block * size, size, a + kRows * k, false,
                          sum);
      for (int i = 0; i < n; ++i) {
        for (int j = 0; j < kSome; ++j) {
          const int lanes = static_cast<int>(min(kLanes<T>, columns.end - column - j * kLanes<T>));
          T* to = c + i * p.n + j * kLanes<T>;
          frnn::store(to, frnn::load<V>(to, lanes) + sum[i * kSome + j], lanes);
        }
      }
    }
  }

  T* const a_;     // packed
  T* const b_[2];  // packed
};
