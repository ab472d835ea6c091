// SPDX-License-Identifier: Apache-2.0
// What layer norm knows of a row. Included by recurrence.inl inside an anonymous namespace.
//
// Every block of units leaves two numbers, whoever computes it, and all who need the row take them
// up in order: the result does not depend on how units are divided, and little passes from core to
// core.

constexpr double kNormEpsilon = 1e-5;

template <int kShift, class V, int... kIndex>
V rotated(V v, std::integer_sequence<int, kIndex...>) {
  return frnn::shuffle<(kIndex + kShift) % int{sizeof...(kIndex)}...>(v, v);
}
template <class T, int kShift = kLanes<T> / 2>
T sum_of_lanes(Vec<T> v) {
  if constexpr (kShift == 0) {
    return v[0];
  } else {
    v += rotated<kShift>(v, std::make_integer_sequence<int, kLanes<T>>{});
    return sum_of_lanes<T, kShift / 2>(v);
  }
}

// 1 in the first n lanes, else 0.
template <class T>
Vec<T> first_lanes(int64_t n) {
  Vec<T> v{};
  for (int64_t i = 0; i < kLanes<T> && i < n; ++i) v[i] = 1;
  return v;
}

// The gradient of what was normalised to n hats and had gains, in place of that of the result;
// scale is one over the standard deviation.
template <class T>
__attribute__((noinline)) void unnormalise(T* d, const T* gains, const T* hats, int64_t n,
                                           T scale) {
  using V = Vec<T>;
  const auto each = [&](const auto& f) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int some = static_cast<int>(min(kLanes<T>, n - i));
      f(i, some, frnn::load<V>(d + i, some) * frnn::load<V>(gains + i, some),
        frnn::load<V>(hats + i, some));
    }
  };
  V sums[2] = {};
  each([&](int64_t, int, V of_hat, V hat) {
    sums[0] += of_hat;
    sums[1] += of_hat * hat;
  });
  const T mean = sum_of_lanes<T>(sums[0]) / T(n), slope = sum_of_lanes<T>(sums[1]) / T(n);
  each([&](int64_t i, int some, V of_hat, V hat) {
    frnn::store(d + i, scale * (of_hat - mean - hat * slope), some);
  });
}

// sum [columns] += the sum over rows of a times b, both [.., columns], for some of the columns. A
// few rows at a time: b comes from memory, where it lies in rows.
template <class T>
__attribute__((noinline)) void add_products(const T* a, const T* b, int64_t columns, Range some,
                                            const Rows& rows, T* sum) {
  using V = Vec<T>;
  constexpr int64_t kFew = 4;
  for (int64_t i = 0; i < rows.count; i += kFew) {
    const int64_t end = min(rows.count, i + kFew);
    for (int64_t j = some.begin; j < some.end; j += kLanes<T>) {
      const int n = static_cast<int>(min(kLanes<T>, some.end - j));
      V total = frnn::load<V>(sum + j, n);
      for (int64_t k = i; k < end; ++k) {
        const int64_t offset = rows[k] * columns + j;
        total += frnn::load<V>(a + offset, n) * frnn::load<V>(b + offset, n);
      }
      frnn::store(sum + j, total, n);
    }
  }
}

// Two numbers for each block of some rows, and what each slice makes of a row's.
template <class T>
class Statistics {
  using V = Vec<T>;

 public:
  Statistics(int64_t rows, int64_t units, int slices, Carver& carver)
      : units_(units),
        rows_(blocks_of<T>(rows) * kLanes<T>),
        of_blocks_(carver.take<T>(2 * blocks_of<T>(units) * rows_)),
        of_rows_(carver.take<T>(2 * slices * rows_)) {}

  void put(int64_t row, int64_t block, T first, T second) const {
    at(block)[row] = first;
    at(block)[rows_ + row] = second;
  }

  // For moments(): of a block's numbers in n vectors, the mean and the sum of squares about it.
  void describe(int64_t row, int64_t block, const V* values, int n) const {
    const int64_t lanes = lanes_of(block);
    const V there = lanes == kLanes<T> ? frnn::broadcast<V>(1) : first_lanes<T>(lanes);
    V sum{}, squares{};
    for (int i = 0; i < n; ++i) sum += values[i];
    const T mean = sum_of_lanes<T>(there * sum) / T(n * lanes);
    for (int i = 0; i < n; ++i) squares += (values[i] - mean) * (values[i] - mean);
    put(row, block, mean, sum_of_lanes<T>(there * squares));
  }

  struct Row {
    T first, second;
  };
  Row of(const Slice& slice, int64_t row) const {
    const T* of_slice = of_rows_ + 2 * slice.index * rows_;
    return {of_slice[row], of_slice[rows_ + row]};
  }

  // Makes of each row, that is of n numbers a unit, the mean and one over the standard deviation.
  // What is squared lies about a mean: of squares less that of the mean little might remain.
  void moments(const Slice& slice, Range rows, int n) const {
    each_group(slice, rows, [&](int64_t row, int some, T* means, T* scales) {
      V mean{}, squares{};
      each_block([&](int64_t block, const T* p) {
        mean += T(n * lanes_of(block)) * frnn::load<V>(p + row, some);
      });
      mean *= T(1) / (T(n) * T(units_));
      each_block([&](int64_t block, const T* p) {
        const V delta = frnn::load<V>(p + row, some) - mean;
        squares += frnn::load<V>(p + rows_ + row, some) + T(n * lanes_of(block)) * delta * delta;
      });
      frnn::store(means, mean, some);
      for (int i = 0; i < some; ++i) {
        const double variance = double(squares[i]) / (double(n) * double(units_));
        scales[i] = static_cast<T>(1 / __builtin_sqrt(variance + kNormEpsilon));
      }
    });
  }

  // .. the sums of what was put, divided by the number of its numbers.
  void means(const Slice& slice, Range rows, int n) const {
    each_group(slice, rows, [&](int64_t row, int some, T* first, T* second) {
      V sums[2] = {};
      each_block([&](int64_t, const T* p) {
        sums[0] += frnn::load<V>(p + row, some);
        sums[1] += frnn::load<V>(p + rows_ + row, some);
      });
      const T share = T(1) / (T(n) * T(units_));
      frnn::store(first, sums[0] * share, some);
      frnn::store(second, sums[1] * share, some);
    });
  }

 private:
  int64_t lanes_of(int64_t block) const { return min(kLanes<T>, units_ - block * kLanes<T>); }
  T* at(int64_t block) const { return of_blocks_ + 2 * block * rows_; }

  template <class F>
  void each_block(const F& f) const {
    for (int64_t block = 0; block < blocks_of<T>(units_); ++block) f(block, at(block));
  }

  // Rows side by side in a vector.
  template <class F>
  void each_group(const Slice& slice, Range rows, const F& f) const {
    T* of_slice = of_rows_ + 2 * slice.index * rows_;
    for (int64_t row = rows.begin; row < rows.end; row += kLanes<T>) {
      f(row, static_cast<int>(min(kLanes<T>, rows.end - row)), of_slice + row,
        of_slice + rows_ + row);
    }
  }

  const int64_t units_, rows_;
  T* const of_blocks_;  // [blocks][2][rows]
  T* const of_rows_;    // [slices][2][rows]
};

// Two vectors for each block of some rows.
template <class T>
class Pairs {
  using V = Vec<T>;

 public:
  Pairs(int64_t rows, int64_t units, Carver& carver)
      : blocks_(blocks_of<T>(units)),
        data_(reinterpret_cast<V*>(carver.take<T>(2 * rows * blocks_ * kLanes<T>))) {}

  V* at(int64_t row, int64_t block) const { return data_ + 2 * (row * blocks_ + block); }

 private:
  const int64_t blocks_;
  V* const data_;
};
