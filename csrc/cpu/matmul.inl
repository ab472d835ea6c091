// SPDX-License-Identifier: Apache-2.0
// Large products of matrices. Included by recurrence.inl inside an anonymous namespace.
//
// All factors are packed piece by piece, so that what the microkernel reads comes from the L1 and
// L2 caches (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008). Each
// sum is formed in the same order however the rows are divided.

template <class T>
class Matmul {
  using V = Vec<T>;
  using Factor = typename frnn::MatmulArgs<T>::Factor;
  static constexpr int kBlocks = Shape<1>::kBlocks, kRows = kRowsOf<kBlocks>;
  static constexpr int64_t kDepth = 256;         // of K: more, and panels of b leave the L1 cache
  static constexpr int64_t kHeight = 96;         // rows of a, which with kDepth fill a part of L2
  static constexpr int64_t kWidth = 512;         // columns of all b that are packed for all rows
  static constexpr double kFlopsPerSlice = 1e6;  // 11 us, to be worth waking a thread

 public:
  static void run(const frnn::MatmulArgs<T>& args, const frnn::cpu::Pool& pool) {
    double flops = 0;
    for (const Factor& f : args.factors) flops += 2.0 * args.m * args.k * f.n;
    const int64_t most = min(static_cast<int64_t>(flops / kFlopsPerSlice), args.m / kRows);
    const int64_t slices = min(pool.threads, most < 1 ? 1 : most);
    const frnn::cpu::Plan plan{.by_units = false, .slices = static_cast<int>(slices)};
    Carver measure(nullptr);
    Matmul(args, plan, measure);
    Carver carver(frnn::cpu::workspace(measure.used()));
    Matmul matmul(args, plan, carver);
    run_slices(matmul, plan, pool);
  }

  template <class Each, class Meet>
  void work(const Each& each, const Meet&) {
    each([&](int i) { multiply_slice(i); });
  }

 private:
  Matmul(const frnn::MatmulArgs<T>& args, const frnn::cpu::Plan& plan, Carver& carver)
      : a_(args), plan_(plan), width_(a_.factors[1].b ? kWidth / 2 : kWidth) {
    packed_a_ = carver.take<T>(plan.slices * kHeight * kDepth);
    for (int i = 0; i < 2; ++i) packed_b_[i] = carver.take<T>(plan.slices * b_size(a_.factors[i]));
  }

  int64_t b_size(const Factor& f) const {
    return blocks_of<T>(min(f.n, width_)) * kLanes<T> * min(a_.k, kDepth);
  }

  void multiply_slice(int i) const {
    const Range rows = part(a_.m, i, plan_.slices);
    const int64_t n = a_.factors[0].n < a_.factors[1].n ? a_.factors[1].n : a_.factors[0].n;
    for (int64_t n0 = 0; n0 < n; n0 += width_) {
      for (int64_t k0 = 0; k0 == 0 || k0 < a_.k; k0 += kDepth) {  // once even if K is 0
        multiply_rows(i, rows, n0, {k0, min(a_.k, k0 + kDepth)});
      }
    }
  }

  // The columns from n0 on and a part of K.
  void multiply_rows(int i, Range rows, int64_t n0, Range depth) const {
    T* a = packed_a_ + i * kHeight * kDepth;
    const auto columns = [&](const Factor& f) { return Range{n0, min(f.n, n0 + width_)}; };
    const auto b = [&](int j) { return packed_b_[j] + i * b_size(a_.factors[j]); };
    for (int j = 0; j < 2; ++j) {
      const Factor& f = a_.factors[j];
      const int64_t n = columns(f).size();
      if (n <= 0) continue;
      pack_columns(f.b + depth.begin * f.n + n0, f.n, n, depth.size(), {0, blocks_of<T>(n)}, b(j));
    }
    for (int64_t m0 = rows.begin; m0 < rows.end; m0 += kHeight) {
      const Range some{m0, min(rows.end, m0 + kHeight)};
      a_.transposed ? pack_transposed(some, depth, a) : pack(some, depth, a);
      for (int j = 0; j < 2; ++j) {
        multiply_block(a_.factors[j], some, columns(a_.factors[j]), depth, a, b(j));
      }
    }
  }

  // a [M, K] -> [rows][kDepth]
  void pack(Range rows, Range depth, T* to) const {
    for (int64_t row = rows.begin; row < rows.end; ++row, to += kDepth) {
      const T* from = a_.a + row * a_.k + depth.begin;
      __builtin_memcpy(to, from, depth.size() * sizeof(T));
    }
  }

  // a [K, M] -> [rows / kRows][kDepth][kRows]
  void pack_transposed(Range rows, Range depth, T* to) const {
    constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);  // short runs that no hardware foresees
    for (int64_t k = depth.begin; k < depth.end; ++k, to += kRows) {
      const T* from = a_.a + k * a_.m;
      if (k + kAhead < a_.k) {
        for (int64_t row = rows.begin; row < rows.end; row += kLine) {
          __builtin_prefetch(from + kAhead * a_.m + row);
        }
      }
      int64_t row = rows.begin;
      for (T* tile = to; row < rows.end; row += kRows, tile += kDepth * kRows) {
        if (row + kRows <= rows.end) {
          __builtin_memcpy(tile, from + row, kRows * sizeof(T));
        } else {
          __builtin_memcpy(tile, from + row, (rows.end - row) * sizeof(T));
        }
      }
    }
  }

  void multiply_block(const Factor& f, Range rows, Range columns, Range depth, const T* a,
                      const T* b) const {
    const int64_t blocks = blocks_of<T>(columns.size()), size = depth.size() * kLanes<T>;
    int64_t block = 0;
    for (; block + kBlocks <= blocks; block += kBlocks) {
      multiply_panel<kBlocks>(f, rows, columns, depth, block, a, b + block * size);
    }
    for (; block < blocks; ++block) {
      multiply_panel<1>(f, rows, columns, depth, block, a, b + block * size);
    }
  }

  template <int kSome>
  void multiply_panel(const Factor& f, Range rows, Range columns, Range depth, int64_t block,
                      const T* a, const T* b) const {
    static constexpr auto kTable =
        MultiplyTable<kSome, 1, T>::make(std::make_integer_sequence<int, kRows>{});
    const int64_t row_step = a_.transposed ? 1 : kDepth, k_step = a_.transposed ? kRows : 1;
    const int64_t column = columns.begin + block * kLanes<T>;
    V sum[kRows * kSome];
    for (int64_t row = rows.begin; row < rows.end; row += kRows, a += kRows * kDepth) {
      const int n = static_cast<int>(min(kRows, rows.end - row));
      T* c = f.c + row * f.n + column;
      for (int i = 0; i < n; ++i) {
        __builtin_prefetch(c + i * f.n, 1);
        __builtin_prefetch(c + i * f.n + kSome * kLanes<T> - 1, 1);
      }
      kTable.entry[n - 1](a, row_step, k_step, depth.size(), b, depth.size() * kLanes<T>, false,
                          sum);
      add(c, f.n, n, min(kSome * kLanes<T>, columns.end - column), kSome, depth.begin > 0, sum);
    }
  }

  // c [rows, columns] (+)= sum
  void add(T* c, int64_t ldc, int rows, int64_t columns, int blocks, bool accumulate,
           const V* sum) const {
    for (int i = 0; i < rows; ++i, c += ldc) {
      for (int64_t j = 0; j < blocks; ++j, ++sum) {
        const int n = static_cast<int>(min(kLanes<T>, columns - j * kLanes<T>));
        T* to = c + j * kLanes<T>;
        frnn::store(to, accumulate ? frnn::load<V>(to, n) + *sum : *sum, n);
      }
    }
  }

  const frnn::MatmulArgs<T>& a_;
  const frnn::cpu::Plan plan_;
  const int64_t width_;    // columns of each b
  T* packed_a_ = nullptr;  // [slices][kHeight * kDepth]
  T* packed_b_[2];         // [slices][b_size()]
};
