// SPDX-License-Identifier: Apache-2.0
// The ops of the CPU engine: schemas, checks, allocation. The only file that sees torch, and only
// its stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "recurrence.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

std::string text(const int64_t* sizes, int64_t n) {
  std::string s = "[";
  for (int64_t i = 0; i < n; ++i) {
    if (i > 0) s += ", ";
    s += std::to_string(sizes[i]);
  }
  s += ']';
  return s;
}

const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

void check(const char* what, const Tensor& tensor, ScalarType type, Sizes sizes) {
  const auto got = tensor.sizes();
  bool same = got.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = got[i] == sizes.begin()[i];
  STD_TORCH_CHECK(same, what, " has shape ", text(got.data(), got.size()), ", expected ",
                  text(sizes.begin(), sizes.size()));
  STD_TORCH_CHECK(tensor.scalar_type() == type, what, " is ", name(tensor.scalar_type()),
                  ", expected ", name(type));
  STD_TORCH_CHECK(tensor.is_cpu(), what, " is not on the CPU, where the other tensors are");
  STD_TORCH_CHECK(tensor.is_contiguous(), what, " is not contiguous");
}

void check(const char* what, const OptionalTensor& tensor, ScalarType type, Sizes sizes) {
  if (tensor) check(what, *tensor, type, sizes);
}

template <class T>
const T* input(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

const frnn::CellFacts& facts_of(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell < frnn::cell_count(), "cell is ", cell, ", expected 0 to ",
                  frnn::cell_count() - 1);
  return frnn::cell_facts(static_cast<int>(cell));
}

// Allocates results like one of the inputs; those that do not apply are empty.
struct Allocator {
  const Tensor& like;

  Tensor operator()(Sizes sizes) const {
    return torch::stable::new_empty(like, {sizes.begin(), sizes.size()});
  }
  Tensor operator()(bool needed, Sizes sizes) const {
    return needed ? (*this)(sizes) : (*this)({0});
  }
};

frnn::cpu::Pool torch_pool() {
  const auto run = [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, n, 1,
                                [=](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

// Checks what both directions share and fills in their common arguments.
template <class T>
void set_sequence(frnn::SequenceArgs<T>& args, const frnn::CellFacts& cell, ScalarType type,
                  const Tensor& w_hh, const OptionalTensor& w_hr, const OptionalTensor& lengths,
                  const OptionalTensor& resets, bool reverse) {
  check("w_hh", w_hh, type, {cell.gates * args.h, args.p});
  check("w_hr", w_hr, type, {args.p, args.h});
  check("lengths", lengths, ScalarType::Long, {args.b});
  check("resets", resets, ScalarType::Bool, {args.t, args.b});
  STD_TORCH_CHECK(args.h >= 1 && args.p >= 1, "hidden size is ", args.h, ", output size is ",
                  args.p, ", expected at least 1");
  STD_TORCH_CHECK(w_hr || args.p == args.h, "output size is ", args.p,
                  " without w_hr, expected the hidden size ", args.h);
  STD_TORCH_CHECK(!w_hr || !cell.reads_h, "w_hr is given, but ", cell.name, " has no projection");
  args.reverse = reverse;
  args.w_hh = input<T>(w_hh);
  args.w_hr = input<T>(w_hr);
  args.lengths = input<int64_t>(lengths);
  args.resets = input<bool>(resets);
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
ForwardResult forward_of(ScalarType type, const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                         const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                         const OptionalTensor& w_hr, const Tensor& h0, const OptionalTensor& c0,
                         const OptionalTensor& lengths, const OptionalTensor& resets,
                         int64_t cell_index, bool reverse, bool training, bool cell_states) {
  const frnn::CellFacts& cell = facts_of(cell_index);
  const int64_t g = cell.gates, s = cell.states;
  STD_TORCH_CHECK(x.dim() == 3 && w_hh.dim() == 2, "x has ", x.dim(), " dimensions and w_hh ",
                  w_hh.dim(), ", expected 3 and 2");
  frnn::ForwardArgs<T> args{};
  args.t = x.size(0);
  args.b = x.size(1);
  args.i = x.size(2);
  args.h = w_hh.size(0) / g;
  args.p = w_hh.size(1);
  const auto [t, b, h, p] = std::tuple{args.t, args.b, args.h, args.p};
  set_sequence(args, cell, type, w_hh, w_hr, lengths, resets, reverse);
  STD_TORCH_CHECK(args.i >= 1, "input size is 0, expected at least 1");
  check("x", x, type, {t, b, args.i});
  check("w_ih", w_ih, type, {g * h, args.i});
  check("b_ih", b_ih, type, {g * h});
  check("b_hh", b_hh, type, {g * h});
  check("h0", h0, type, {b, p});
  check("c0", c0, type, {s - 1, b, h});
  STD_TORCH_CHECK(c0.has_value() == (s > 1), "c0 is ", c0 ? "given" : "missing", ", but ",
                  cell.name, " has ", s, " state(s)");
  STD_TORCH_CHECK(!cell_states || s > 1, "cell_states is true, but ", cell.name,
                  " has only one state");

  const Allocator make{x};
  ForwardResult result{make({t, b, p}),
                       make({b, p}),
                       make(s > 1, {s - 1, b, h}),
                       make(cell_states, {t, b, h}),
                       make(training, {t, b, p}),
                       make(training && s > 1, {s - 1, t, b, h}),
                       make(training, {cell.saved, t, b, h}),
                       make(training && w_hr, {t, b, h})};
  const auto& [y, h_n, c_n, c, h_prev, c_prev, saved, m] = result;
  args.x = input<T>(x);
  args.w_ih = input<T>(w_ih);
  args.b_ih = input<T>(b_ih);
  args.b_hh = input<T>(b_hh);
  args.h0 = input<T>(h0);
  args.c0 = input<T>(c0);
  args.y = output<T>(y);
  args.h_n = output<T>(h_n);
  args.c_n = output<T>(c_n);
  args.c = cell_states ? output<T>(c) : nullptr;
  args.h_prev = training ? output<T>(h_prev) : nullptr;
  args.c_prev = training ? output<T>(c_prev) : nullptr;
  args.saved = training ? output<T>(saved) : nullptr;
  args.m = training && w_hr ? output<T>(m) : nullptr;
  frnn::cpu::forward(static_cast<int>(cell_index), args, torch_pool());
  return result;
}

ForwardResult recurrence_forward(Tensor x, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
                                 OptionalTensor b_hh, OptionalTensor w_hr, Tensor h0,
                                 OptionalTensor c0, OptionalTensor lengths, OptionalTensor resets,
                                 int64_t cell, bool reverse, bool training, bool cell_states) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x is ", name(type),
                  ", expected float32 or float64");
  const auto run = type == ScalarType::Float ? forward_of<float> : forward_of<double>;
  return run(type, x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, resets, cell, reverse,
             training, cell_states);
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
BackwardResult backward_of(ScalarType type, const OptionalTensor& dy, const OptionalTensor& dc,
                           const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                           const Tensor& w_hh, const OptionalTensor& w_hr, const Tensor& h_prev,
                           const Tensor& c_prev, const Tensor& saved, const OptionalTensor& lengths,
                           const OptionalTensor& resets, int64_t cell_index, bool reverse) {
  const frnn::CellFacts& cell = facts_of(cell_index);
  const int64_t g = cell.gates, s = cell.states;
  STD_TORCH_CHECK(h_prev.dim() == 3 && w_hh.dim() == 2, "h_prev has ", h_prev.dim(),
                  " dimensions and w_hh ", w_hh.dim(), ", expected 3 and 2");
  frnn::BackwardArgs<T> args{};
  args.t = h_prev.size(0);
  args.b = h_prev.size(1);
  args.h = w_hh.size(0) / g;
  args.p = w_hh.size(1);
  const auto [t, b, h, p] = std::tuple{args.t, args.b, args.h, args.p};
  set_sequence(args, cell, type, w_hh, w_hr, lengths, resets, reverse);
  check("dy", dy, type, {t, b, p});
  check("dc", dc, type, {t, b, h});
  check("dh_n", dh_n, type, {b, p});
  check("dc_n", dc_n, type, {s - 1, b, h});
  check("h_prev", h_prev, type, {t, b, p});
  if (s > 1) check("c_prev", c_prev, type, {s - 1, t, b, h});
  check("saved", saved, type, {cell.saved, t, b, h});
  STD_TORCH_CHECK(s > 1 || (!dc && !dc_n), "dc or dc_n is given, but ", cell.name,
                  " has only one state");

  const Allocator make{h_prev};
  BackwardResult result{make({t, b, g * h}), make(!cell.additive, {t, b, g * h}), make({b, p}),
                        make(s > 1, {s - 1, b, h}), make(w_hr.has_value(), {t, b, p})};
  const auto& [dgx, dgh, dh0, dc0, dh] = result;
  args.dy = input<T>(dy);
  args.dc = input<T>(dc);
  args.dh_n = input<T>(dh_n);
  args.dc_n = input<T>(dc_n);
  args.h_prev = input<T>(h_prev);
  args.c_prev = input<T>(c_prev);
  args.saved = input<T>(saved);
  args.dgx = output<T>(dgx);
  args.dgh = cell.additive ? args.dgx : output<T>(dgh);
  args.dh0 = output<T>(dh0);
  args.dc0 = output<T>(dc0);
  args.dh = w_hr ? output<T>(dh) : nullptr;
  frnn::cpu::backward(static_cast<int>(cell_index), args, torch_pool());
  return result;
}

// m is only needed for dW_hr, which the caller forms; it is an argument so that one op saves and
// takes the same tensors.
BackwardResult recurrence_backward(OptionalTensor dy, OptionalTensor dc, OptionalTensor dh_n,
                                   OptionalTensor dc_n, Tensor w_hh, OptionalTensor w_hr,
                                   Tensor h_prev, Tensor c_prev, Tensor saved, Tensor /*m*/,
                                   OptionalTensor lengths, OptionalTensor resets, int64_t cell,
                                   bool reverse) {
  const ScalarType type = h_prev.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "h_prev is ", name(type),
                  ", expected float32 or float64");
  const auto run = type == ScalarType::Float ? backward_of<float> : backward_of<double>;
  return run(type, dy, dc, dh_n, dc_n, w_hh, w_hr, h_prev, c_prev, saved, lengths, resets, cell,
             reverse);
}

using MatmulResult = std::tuple<Tensor, Tensor>;

template <class T>
MatmulResult matmul_of(ScalarType type, const Tensor& a, const Tensor& b,
                       const OptionalTensor& other, bool transposed) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && (!other || other->dim() == 2),
                  "a, b and other have ", a.dim(), ", ", b.dim(), " and ", other ? other->dim() : 2,
                  " dimensions, expected 2");
  const int64_t m = a.size(transposed ? 1 : 0), k = a.size(transposed ? 0 : 1);
  const int64_t n = b.size(1), n_other = other ? other->size(1) : 0;
  check("a", a, type, {a.size(0), a.size(1)});
  check("b", b, type, {k, n});
  check("other", other, type, {k, n_other});
  const Allocator make{a};
  MatmulResult result{make({m, n}), make(other.has_value(), {m, n_other})};
  const auto& [c, c_other] = result;
  const frnn::MatmulArgs<T> args{
      .m = m,
      .k = k,
      .a = input<T>(a),
      .transposed = transposed,
      .factors = {{n, input<T>(b), output<T>(c)}, {n_other, input<T>(other), output<T>(c_other)}}};
  frnn::cpu::matmul(args, torch_pool());
  return result;
}

MatmulResult matmul(Tensor a, Tensor b, OptionalTensor other, bool transposed) {
  const ScalarType type = a.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "a is ", name(type),
                  ", expected float32 or float64");
  const auto run = type == ScalarType::Float ? matmul_of<float> : matmul_of<double>;
  return run(type, a, b, other, transposed);
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedrnn, library) {
  library.def(
      "recurrence_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? w_hr, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, int cell, "
      "bool reverse, bool training, bool cell_states) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor "
      "c, Tensor h_prev, "
      "Tensor c_prev, Tensor saved, Tensor m)");
  library.def(
      "recurrence_backward(Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor w_hh, "
      "Tensor? w_hr, Tensor h_prev, Tensor c_prev, Tensor saved, Tensor m, Tensor? lengths, "
      "Tensor? resets, int cell, bool reverse) -> (Tensor dgx, Tensor dgh, Tensor dh0, "
      "Tensor dc0, Tensor dh)");
  library.def(
      "matmul(Tensor a, Tensor b, Tensor? other, bool transposed) -> (Tensor c, Tensor c_other)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, library) {
  library.impl("recurrence_forward", TORCH_BOX(&recurrence_forward));
  library.impl("recurrence_backward", TORCH_BOX(&recurrence_backward));
  library.impl("matmul", TORCH_BOX(&matmul));
}

// For the tests, by ctypes: the facts of the cells, one line each, and the instruction sets.
#define FRNN_EXPORT extern "C" __attribute__((visibility("default")))

FRNN_EXPORT const char* frnn_cells() {
  static const std::string lines = [] {
    std::string all;
    for (int i = 0; i < frnn::cell_count(); ++i) {
      const frnn::CellFacts& cell = frnn::cell_facts(i);
      all += cell.name;
      for (const int fact : {cell.gates, cell.states, cell.saved, int{cell.additive}}) {
        all += ' ';
        all += std::to_string(fact);
      }
      all += '\n';
    }
    return all;
  }();
  return lines.c_str();
}

FRNN_EXPORT const char* frnn_isa() { return frnn::cpu::isa(); }
FRNN_EXPORT const char* frnn_isas() { return frnn::cpu::isas(); }
FRNN_EXPORT int frnn_set_isa(const char* name) { return frnn::cpu::set_isa(name); }
