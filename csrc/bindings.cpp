// SPDX-License-Identifier: Apache-2.0
// The ops: schemas, and the CPU engine behind them.
#include "bindings.h"

namespace {

using namespace frnn::bindings;

frnn::cpu::Pool torch_pool() {
  const auto run = [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, n, 1,
                                [=](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

// Calls f.template operator()<T>() for the type of `tensor`.
template <class F>
auto dispatch(const char* what, const Tensor& tensor, F f) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, what, " is ", text(type),
                  ", expected float32 or float64");
  return type == ScalarType::Float ? f.template operator()<float>()
                                   : f.template operator()<double>();
}

ForwardResult recurrence_forward(Tensor x, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
                                 OptionalTensor b_hh, OptionalTensor w_hr, Tensor h0,
                                 OptionalTensor c0, OptionalTensor lengths, OptionalTensor resets,
                                 int64_t cell_index, bool reverse, bool training,
                                 bool cell_states) {
  return dispatch("x", x, [&]<class T>() {
    const frnn::CellFacts& cell = facts_of(cell_index);
    frnn::ForwardArgs<T> args{};
    ForwardResult result = prepare_forward(args, cell, x.scalar_type(), "x", x, w_hh, b_hh, w_hr,
                                           h0, c0, lengths, resets, reverse, training, cell_states);
    args.i = x.size(2);
    STD_TORCH_CHECK(args.i >= 1, "input size is 0, expected at least 1");
    const Check check(x);
    check("x", x, {args.t, args.b, args.i});
    check("w_ih", w_ih, {cell.gates * args.h, args.i});
    check("b_ih", b_ih, {cell.gates * args.h});
    read(args.x, x);
    read(args.w_ih, w_ih);
    read(args.b_ih, b_ih);
    frnn::cpu::forward(static_cast<int>(cell_index), args, torch_pool());
    return result;
  });
}

// m is only needed for dW_hr, which the caller forms; it is an argument so that one op saves and
// takes the same tensors.
BackwardResult recurrence_backward(OptionalTensor dy, OptionalTensor dc, OptionalTensor dh_n,
                                   OptionalTensor dc_n, Tensor w_hh, OptionalTensor w_hr,
                                   Tensor h_prev, Tensor c_prev, Tensor saved, Tensor /*m*/,
                                   OptionalTensor lengths, OptionalTensor resets,
                                   int64_t cell_index, bool reverse) {
  return dispatch("h_prev", h_prev, [&]<class T>() {
    frnn::BackwardArgs<T> args{};
    BackwardResult result =
        prepare_backward(args, facts_of(cell_index), h_prev.scalar_type(), dy, dc, dh_n, dc_n, w_hh,
                         w_hr, h_prev, c_prev, saved, lengths, resets, reverse);
    frnn::cpu::backward(static_cast<int>(cell_index), args, torch_pool());
    return result;
  });
}

using MatmulResult = std::tuple<Tensor, Tensor>;

MatmulResult matmul(Tensor a, Tensor b, OptionalTensor other, bool transposed) {
  return dispatch("a", a, [&]<class T>() {
    STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && (!other || other->dim() == 2),
                    "a, b and other have ", a.dim(), ", ", b.dim(), " and ",
                    other ? other->dim() : 2, " dimensions, expected 2");
    frnn::MatmulArgs<T> args{};
    args.m = a.size(transposed ? 1 : 0);
    args.k = a.size(transposed ? 0 : 1);
    args.transposed = transposed;
    auto& [first, second] = args.factors;
    first.n = b.size(1);
    second.n = other ? other->size(1) : 0;
    const Check check(a);
    check("a", a, {a.size(0), a.size(1)});
    check("b", b, {args.k, first.n});
    check("other", other, {args.k, second.n});

    const Allocator make{a};
    MatmulResult result{make({args.m, first.n}), make(other.has_value(), {args.m, second.n})};
    const auto& [c, c_other] = result;
    read(args.a, a);
    read(first.b, b);
    read(second.b, other);
    write(first.c, true, c);
    write(second.c, other.has_value(), c_other);
    frnn::cpu::matmul(args, torch_pool());
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedrnn, library) {
  library.def(
      "recurrence_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? w_hr, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, int cell, "
      "bool reverse, bool training, bool cell_states) -> (Tensor y, Tensor h_n, Tensor c_n, "
      "Tensor c, Tensor h_prev, Tensor c_prev, Tensor saved, Tensor m)");
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
