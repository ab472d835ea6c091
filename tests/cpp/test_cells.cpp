// SPDX-License-Identifier: Apache-2.0
// Every cell's backward against finite differences, and numeric.h against the standard library.
// Needs no torch and no test framework: prints what fails, and fails.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cells/cell.h"
#include "numeric.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what, double value, double limit) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %g, limit %g\n", what, value, limit);
}

// ---- Cells.

// A random linear function of everything a cell puts out; its gradient is known exactly, so that
// backward can be compared with differences of it in every input.
template <frnn::CellPolicy Cell>
class CellCheck {
 public:
  void run() {
    for (int trial = 0; trial < 200; ++trial) {
      fill(gx_);
      fill(gh_);
      fill(s_);
      fill(dout_);
      fill(p_);
      double out[Cell::kStates], saved[Cell::kSaved];
      double dgx[Cell::kGates], dgh[Cell::kGates], ds[Cell::kStates] = {}, dp[Cell::kParams + 1];
      Cell::forward(gx_, gh_, s_, p_, out, saved);
      Cell::backward(s_, saved, p_, dout_, dgx, dgh, ds, dp);
      compare("dgx", gx_, dgx, Cell::kGates);
      compare("dgh", gh_, dgh, Cell::kGates);
      compare("ds", s_, ds, Cell::kStates);
      compare("dp", p_, dp, Cell::kParams);
      for (int g = 0; g < Cell::kGates && Cell::kAdditive; ++g) {
        expect(dgx[g] == dgh[g], Cell::kName, dgx[g], dgh[g]);
      }
      if constexpr (frnn::kLateGates<Cell> > 0) {
        late_ = true;
        dgx[0] = Cell::backward_of_factor(s_[0], saved, dout_[0], ds);
        compare("of factor dgx", gx_, dgx, 1);
        compare("of factor ds", s_, ds, 1);
        late_ = false;
      }
    }
  }

 private:
  template <size_t n>
  void fill(double (&x)[n]) {
    for (double& v : x) v = normal_(random_);
  }

  double loss() const {
    if constexpr (frnn::kLateGates<Cell> > 0) {
      if (late_) return dout_[0] * Cell::factor(gx_, gh_) * s_[0];
    }
    double out[Cell::kStates], saved[Cell::kSaved], sum = 0;
    Cell::forward(gx_, gh_, s_, p_, out, saved);
    for (int j = 0; j < Cell::kStates; ++j) sum += dout_[j] * out[j];
    return sum;
  }

  void compare(const char* what, double* x, const double* gradient, int n) {
    constexpr double kStep = 1e-5, kLimit = 1e-8;  // central differences: step^2 and eps / step
    for (int i = 0; i < n; ++i) {
      const double x0 = x[i];
      x[i] = x0 + kStep;
      const double up = loss();
      x[i] = x0 - kStep;
      const double down = loss();
      x[i] = x0;
      const double error = std::abs((up - down) / (2 * kStep) - gradient[i]);
      if (std::abs(up - down) < kStep * 1e-3 && error > kLimit) continue;  // at the kink of relu
      char text[64];
      std::snprintf(text, sizeof text, "%s %s[%d]", Cell::kName, what, i);
      expect(error < kLimit, text, error, kLimit);
    }
  }

  std::mt19937 random_{1};
  std::normal_distribution<double> normal_;
  double gx_[Cell::kGates], gh_[Cell::kGates], s_[Cell::kStates], dout_[Cell::kStates];
  double p_[Cell::kParams + 1];
  bool late_ = false;  // what enters the late gates' product is checked
};

template <frnn::CellPolicy... Cell>
void check_cells(frnn::CellList<Cell...>) {
  (CellCheck<Cell>().run(), ...);
}

// ---- Functions.

struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  static constexpr double kUlps = 3;
  template <class V>
  static V ours(V x) {
    return frnn::sigmoid(x);
  }
  static long double exact(long double x) { return 1 / (1 + std::exp(-x)); }
};
struct Tanh {
  static constexpr const char* kName = "tanh";
  static constexpr double kUlps = 1.5;
  template <class V>
  static V ours(V x) {
    return frnn::tanh(x);
  }
  static long double exact(long double x) { return std::tanh(x); }
};

// Error in units of the last place of T; results about the smallest normal number may be 0.
template <class T>
double ulps(T got, long double exact) {
  constexpr T kTiny = 2 * std::numeric_limits<T>::min();
  if (std::abs(exact) < kTiny) return std::abs(got) <= kTiny ? 0 : INFINITY;
  if (std::abs(exact) > std::numeric_limits<T>::max()) return std::isinf(got) ? 0 : INFINITY;
  const int exponent = std::ilogb(static_cast<double>(exact));
  const long double unit = std::ldexp(1.0L, exponent + 1 - std::numeric_limits<T>::digits);
  return static_cast<double>(std::abs(got - exact) / unit);
}

template <class Function, class T>
void check_value(T x, double& worst, T& at) {
  const T got = Function::ours(x);
  const double error = ulps(got, Function::exact(x));
  if (!(error <= worst)) {
    worst = error;
    at = x;
  }
}

template <class Function, class T>
void check_function(const char* type) {
  double worst = 0;
  T at = 0;
  for (int i = -1100000; i <= 1100000; ++i) {
    check_value<Function, T>(static_cast<T>(i * 1e-4), worst, at);             // +-110 evenly
    check_value<Function, T>(static_cast<T>(std::exp2(i * 1e-4)), worst, at);  // all magnitudes
    check_value<Function, T>(static_cast<T>(-std::exp2(i * 1e-4)), worst, at);
  }
  std::printf("%-8s %-6s worst %.2f ulp at %g\n", Function::kName, type, worst, double(at));
  expect(worst <= Function::kUlps, Function::kName, worst, Function::kUlps);
}

// A vector must give exactly what its lanes give one by one, and so must the functions at the ends.
template <class T>
void check_special() {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const auto is = [](const char* what, T got, T expected) {
    const bool same = got == expected || (std::isnan(got) && std::isnan(expected));
    expect(same, what, double(got), double(expected));
  };
  is("sigmoid(inf)", frnn::sigmoid(kInf), 1);
  is("sigmoid(-inf)", frnn::sigmoid(-kInf), 0);
  is("sigmoid(nan)", frnn::sigmoid(nan), nan);
  is("tanh(inf)", frnn::tanh(kInf), 1);
  is("tanh(-inf)", frnn::tanh(-kInf), -1);
  is("tanh(nan)", frnn::tanh(nan), nan);
  is("tanh(0)", frnn::tanh(T(0)), 0);

  constexpr int kLanes = 16 / sizeof(T);
  using V = frnn::Vector<T, kLanes>;
  const std::vector<T> x = {T(0.3), -kInf, nan, T(-2.5), kInf, T(40), T(1e-9), T(-88.5)};
  for (size_t i = 0; i + kLanes <= x.size(); i += kLanes) {
    const V v = frnn::load<V>(&x[i]);
    const V s = frnn::sigmoid(v), t = frnn::tanh(v);
    for (int lane = 0; lane < kLanes; ++lane) {
      is("sigmoid lane", s[lane], frnn::sigmoid(x[i + lane]));
      is("tanh lane", t[lane], frnn::tanh(x[i + lane]));
    }
    const V head = frnn::load<V>(&x[i], 1);
    is("partial load", head[0], x[i]);
    is("partial load, rest", head[kLanes - 1], 0);
  }
}

template <class T>
void check_functions(const char* type) {
  check_function<Sigmoid, T>(type);
  check_function<Tanh, T>(type);
  check_special<T>();
}

}  // namespace

int main() {
  check_cells(frnn::Cells{});
  check_functions<float>("float");
  check_functions<double>("double");
  if (failures == 0) std::printf("all good\n");
  return failures == 0 ? 0 : 1;
}
