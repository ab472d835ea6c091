// SPDX-License-Identifier: Apache-2.0
// What layer norm knows of a row. Included by recurrence.inl inside an anonymous namespace.
//
// Every block of units leaves two vectors, whoever computes it, and all who need the row take them
// up in order: the result does not depend on how units are divided.

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

// Two vectors for each block of some rows.
template <class T>
class Pairs {
  using V = Vec<T>;

 public:
  Pairs(int64_t rows, int64_t units, Carver& carver)
      : units_(units), data_(reinterpret_cast<V*>(carver.take<T>(2 * size(rows)))) {}

  V* at(int64_t row, int64_t block) const {
    return data_ + 2 * (row * blocks_of<T>(units_) + block);
  }

  // For moments(): of n vectors, lane by lane, the mean and the sum of squares about it.
  void describe(int64_t row, int64_t block, const V* values, int n) const {
    V mean{}, squares{};
    for (int i = 0; i < n; ++i) mean += values[i];
    mean *= T(1) / T(n);
    for (int i = 0; i < n; ++i) squares += (values[i] - mean) * (values[i] - mean);
    at(row, block)[0] = mean;
    at(row, block)[1] = squares;
  }

  // Of a row's n * units numbers the mean, and one over the standard deviation. What is squared
  // lies about a mean: of squares less that of the mean little might remain.
  struct Moments {
    T mean, scale;
  };
  Moments moments(int64_t row, int n) const {
    const T all = T(n) * T(units_);
    const int64_t whole = units_ / kLanes<T>;
    const V* of_block = at(row, 0);
    const V rest = first_lanes<T>(units_ % kLanes<T>);
    V sum{}, squares{};
    for (int64_t i = 0; i < whole; ++i) sum += of_block[2 * i];
    if (whole * kLanes<T> < units_) sum += rest * of_block[2 * whole];
    const T center = T(n) * sum_of_lanes<T>(sum) / all;
    const auto about = [&](const V* of) {
      return of[1] + T(n) * (of[0] - center) * (of[0] - center);
    };
    for (int64_t i = 0; i < whole; ++i) squares += about(of_block + 2 * i);
    if (whole * kLanes<T> < units_) squares += rest * about(of_block + 2 * whole);
    const double variance = double(sum_of_lanes<T>(squares)) / double(all);
    return {center, static_cast<T>(1 / __builtin_sqrt(variance + kNormEpsilon))};
  }

  // Of a row's n * units numbers the means of what the two vectors hold.
  struct Means {
    T first, second;
  };
  Means means(int64_t row, int n) const {
    V sums[2] = {};
    const V* of_block = at(row, 0);
    for (int64_t u = 0; u < units_; u += kLanes<T>, of_block += 2) {
      sums[0] += of_block[0];
      sums[1] += of_block[1];
    }
    const T all = T(n) * T(units_);
    return {sum_of_lanes<T>(sums[0]) / all, sum_of_lanes<T>(sums[1]) / all};
  }

 private:
  int64_t size(int64_t rows) const { return rows * blocks_of<T>(units_) * kLanes<T>; }

  int64_t units_;
  V* data_;
};
