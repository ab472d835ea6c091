// SPDX-License-Identifier: Apache-2.0
// What layer norm knows of a row. Included by recurrence.inl inside an anonymous namespace.
//
// Every block of units leaves two numbers, whoever computes it, and all who need the row take them
// up in order: the result does not depend on how units are divided, and little passes from core to
// core.

constexpr double kNormEpsilon = 1e-5;

// Every kWidth lanes become their sum, each of them: halves onto each other.
template <int kWidth, class V, int... kIndex>
FRNN_FN V fold(V v, std::integer_sequence<int, kIndex...> lanes) {
  if constexpr (kWidth == 1) {
    return v;
  } else {
    v += frnn::shuffle<kIndex / kWidth * kWidth + (kIndex + kWidth / 2) % kWidth...>(v, v);
    return fold<kWidth / 2>(v, lanes);
  }
}
template <class T>
FRNN_FN T sum_of_lanes(Vec<T> v) {
  return fold<kLanes<T>>(v, std::make_integer_sequence<int, kLanes<T>>{})[0];
}

template <class T>
struct Two {
  T first, second;
};
template <class V, int... kIndex>
FRNN_FN V halves_folded(V a, V b, std::integer_sequence<int, kIndex...>) {
  constexpr int kLanes = sizeof...(kIndex), kHalf = kLanes / 2;
  return frnn::shuffle<kIndex % kHalf + kIndex / kHalf * kLanes...>(a, b) +
         frnn::shuffle<kIndex % kHalf + kIndex / kHalf * kLanes + kHalf...>(a, b);
}
// The sums of both, as sum_of_lanes has them, at less than the price of two.
template <class T>
FRNN_FN Two<T> sums_of_lanes(Vec<T> a, Vec<T> b) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<T>>{};
  const Vec<T> sums = fold<kLanes<T> / 2>(halves_folded(a, b, kAll), kAll);
  return {sums[0], sums[kLanes<T> / 2]};
}

// Calls f<kWhole>(block) for some blocks of a row of units; the last one may lack some.
template <class T, class F>
FRNN_FN void each_block(Range blocks, int64_t units, const F& f) {
  const int64_t whole = min(blocks.end, units / kLanes<T>);
  for (int64_t block = blocks.begin; block < whole; ++block) f.template operator()<true>(block);
  if (whole < blocks.end) f.template operator()<false>(whole);
}

// 1 in the first n lanes, else 0.
template <class T>
Vec<T> first_lanes(int64_t n) {
  Vec<T> v{};
  for (int64_t i = 0; i < kLanes<T> && i < n; ++i) v[i] = 1;
  return v;
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

  void put(int64_t row, int64_t block, Two<T> numbers) const {
    at(block)[row] = numbers.first;
    at(block)[rows_ + row] = numbers.second;
  }

  // For moments(): of a block's numbers in kCount vectors, the mean and the sum of squares about
  // it.
  template <int kCount>
  void describe(int64_t row, int64_t block, const V* values) const {
    const int64_t lanes = lanes_of(block);
    const V there = lanes == kLanes<T> ? frnn::broadcast<V>(1) : first_lanes<T>(lanes);
    V sum{}, squares{};
    for (int i = 0; i < kCount; ++i) sum += values[i];
    const T mean = sum_of_lanes<T>(there * sum) * (T(1) / T(kCount * lanes));
    for (int i = 0; i < kCount; ++i) squares += (values[i] - mean) * (values[i] - mean);
    put(row, block, {mean, sum_of_lanes<T>(there * squares)});
  }

  Two<T> of(const Slice& slice, int64_t row) const {
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
