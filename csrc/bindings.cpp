// SPDX-License-Identifier: Apache-2.0
// The ops: schemas, and the CPU engine behind them.
#include "bindings.h"
#include "cpu/team.h"
#include "cuda/plan.h"

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

// .. which may also be bfloat16 where the engine stores a cell's values so.
template <class F>
auto dispatch_stored(const char* what, const Tensor& tensor, int64_t cell, F f) {
  if (tensor.scalar_type() != ScalarType::BFloat16) return dispatch(what, tensor, f);
  const char* name = facts_of(cell).name;
  STD_TORCH_CHECK(frnn::cpu::stores_bfloat16(static_cast<int>(cell)), what, " is bfloat16, but ",
                  "there are no kernels for that of ", name, " on ", frnn::cpu::isa());
  return f.template operator()<frnn::BFloat16>();
}

// The type of what must not be rounded to S.
template <class S>
constexpr ScalarType kWide =
    std::is_same_v<frnn::Wide<S>, double> ? ScalarType::Double : ScalarType::Float;

template <class... Tensors>
void prefer_huge_pages(const std::tuple<Tensors...>& results) {
  const auto prefer = [](const Tensor& tensor) {
    const ScalarType type = tensor.scalar_type();
    const int64_t size = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
    frnn::cpu::prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * size);
  };
  std::apply([&](const auto&... tensor) { (prefer(tensor), ...); }, results);
}

// In forward, the states that enter at resets.
template <class S>
void set_reset(frnn::cpu::ForwardArgs<S>& args, const frnn::CellFacts& cell, const Check& check,
               const OptionalTensor& h_reset, const OptionalTensor& c_reset) {
  STD_TORCH_CHECK(!h_reset || check.type() != ScalarType::BFloat16,
                  "resets are into zeros in bfloat16");
  check("h_reset", h_reset, {args.p});
  check("c_reset", c_reset, {cell.states - 1, args.h});
  STD_TORCH_CHECK(c_reset.has_value() == (h_reset && cell.states > 1), "c_reset is ",
                  c_reset ? "given" : "missing", ", but ", cell.name, " has ", cell.states,
                  " state(s) and h_reset is ", h_reset ? "given" : "missing");
  read(args.reset.h, h_reset);
  read(args.reset.c, c_reset);
}

template <class Args>
void set_noise(Args& args, const frnn::CellFacts& cell, const Check& check,
               const OptionalTensor& dropout, const OptionalTensor& renew_h,
               const OptionalTensor& renew_c, double rate_h, double rate_c) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(args.noise.dropout)>>;
  STD_TORCH_CHECK(check.type() != ScalarType::BFloat16 ||
                      (!dropout && !renew_h && !renew_c && rate_h == 1 && rate_c == 1),
                  "there is neither dropout nor zoneout in bfloat16");
  check("dropout", dropout, {args.b, args.p});
  check("renew_h", renew_h, {args.t, args.b, args.p}, ScalarType::Byte);
  check("renew_c", renew_c, {args.t, args.b, args.h}, ScalarType::Byte);
  STD_TORCH_CHECK(cell.states > 1 || (!renew_c && rate_c == 1), "renew_c or rate_c is given, but ",
                  cell.name, " has only one state");
  read(args.noise.dropout, dropout);
  read(args.noise.renew_h, renew_h);
  read(args.noise.renew_c, renew_c);
  args.noise.rate_h = static_cast<T>(rate_h);
  args.noise.rate_c = static_cast<T>(rate_c);
}

// The norms of a call, with gains and, for the second state, a bias.
struct NormTensors {
  OptionalTensor ih, hh, c, c_bias;
};

// What backward reads of them lies in one array: the hats of W_ih x, W_hh h and c, and the scales.
int64_t size_of_norms(const NormTensors& norms, int64_t t, int64_t b, int64_t gates, int64_t h) {
  return norms.ih ? t * b * (2 * gates + (norms.c ? h : 0) + 3) : 0;
}

template <class T, class E>
void set_norm(frnn::Norm<T, E>& norm, const NormTensors& norms, const frnn::CellFacts& cell,
              const Check& check, int64_t t, int64_t b, int64_t h, E* memory) {
  const int64_t gates = cell.gates * h;
  STD_TORCH_CHECK(!norms.ih || check.type() != ScalarType::BFloat16,
                  "there are no norms in bfloat16");
  check("norm_ih", norms.ih, {gates});
  check("norm_hh", norms.hh, {gates});
  check("norm_c", norms.c, {h});
  check("norm_c_bias", norms.c_bias, {h});
  STD_TORCH_CHECK(norms.ih.has_value() == norms.hh.has_value() &&
                      norms.c.has_value() == norms.c_bias.has_value() && (norms.ih || !norms.c),
                  "norm_ih and norm_hh, and norm_c and norm_c_bias with them, belong together");
  STD_TORCH_CHECK(!norms.c || cell.normalises_state, "norm_c is given, but ", cell.name,
                  " has no state to normalise");
  read(norm.gain_ih, norms.ih);
  read(norm.gain_hh, norms.hh);
  read(norm.gain_c, norms.c);
  read(norm.bias_c, norms.c_bias);
  if (!norms.ih || memory == nullptr) return;
  norm.hat_ih = memory;
  norm.hat_hh = norm.hat_ih + t * b * gates;
  norm.hat_c = norm.hat_hh + t * b * gates;
  norm.scale = norm.hat_c + (norms.c ? t * b * h : 0);
}

// And what norms keep for backward.
using ForwardResultWithNorms =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResultWithNorms recurrence_forward(
    Tensor x, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
    OptionalTensor w_hr, OptionalTensor params, Tensor h0, OptionalTensor c0,
    OptionalTensor lengths, OptionalTensor resets, OptionalTensor h_reset, OptionalTensor c_reset,
    OptionalTensor dropout, OptionalTensor renew_h, OptionalTensor renew_c, OptionalTensor norm_ih,
    OptionalTensor norm_hh, OptionalTensor norm_c, OptionalTensor norm_c_bias, int64_t cell_index,
    bool reverse, bool training, bool cell_states, double rate_h, double rate_c) {
  return dispatch_stored("x", x, cell_index, [&]<class S>() {
    const frnn::CellFacts& cell = facts_of(cell_index);
    frnn::cpu::ForwardArgs<S> args{};
    ForwardResult result = prepare_forward(args, cell, kWide<S>, "x", x, w_hh, b_hh, w_hr, params,
                                           h0, c0, lengths, resets, reverse, training, cell_states);
    prefer_huge_pages(result);
    args.i = x.size(2);
    STD_TORCH_CHECK(args.i >= 1, "input size is 0, expected at least 1");
    const Check check(x);
    check("x", x, {args.t, args.b, args.i});
    check("w_ih", w_ih, {cell.gates * args.h, args.i});
    check("b_ih", b_ih, {cell.gates * args.h});
    read(args.x, x);
    read(args.w_ih, w_ih);
    read(args.b_ih, b_ih);
    set_reset(args, cell, check, h_reset, c_reset);
    set_noise(args, cell, check, dropout, renew_h, renew_c, rate_h, rate_c);
    const NormTensors norms{norm_ih, norm_hh, norm_c, norm_c_bias};
    const Allocator make{x};
    const int64_t size = size_of_norms(norms, args.t, args.b, cell.gates * args.h, args.h);
    const Tensor kept = make({training ? size : 0});
    set_norm(args.norm, norms, cell, check, args.t, args.b, args.h,
             training ? static_cast<frnn::Wide<S>*>(kept.mutable_data_ptr()) : nullptr);
    prefer_huge_pages(std::tuple{kept});
    frnn::cpu::forward(static_cast<int>(cell_index), args, torch_pool());
    return std::tuple_cat(result, std::tuple{kept});
  });
}

// All layers of a direction without training, of a cell with at most two states: y [T, B, P],
// h_n [L, B, P], c_n [L, B, H]. The weights of a layer follow each other: w_ih, w_hh, b_ih and b_hh
// if it has `biases`, w_hr if it has a `projection`, params if the cell has any.
std::tuple<Tensor, Tensor, Tensor> stack_forward(Tensor x, std::vector<Tensor> weights, Tensor h0,
                                                 OptionalTensor c0, OptionalTensor lengths,
                                                 OptionalTensor resets, int64_t cell_index,
                                                 bool biases, bool projection) {
  return dispatch_stored("x", x, cell_index, [&]<class S>() {
    const frnn::CellFacts& cell = facts_of(cell_index);
    const size_t each = 2 + (biases ? 2 : 0) + (projection ? 1 : 0) + (cell.params > 0 ? 1 : 0);
    const auto layers = static_cast<int64_t>(weights.size() / each);
    STD_TORCH_CHECK(layers > 0 && weights.size() % each == 0, "got ", weights.size(),
                    " weights, expected ", each, " for each layer");
    STD_TORCH_CHECK(cell.states <= 2 && c0.has_value() == (cell.states > 1), "c0 is ",
                    c0 ? "given" : "missing", ", but ", cell.name, " has ", cell.states,
                    " state(s)");
    STD_TORCH_CHECK(x.dim() == 3 && weights[1].dim() == 2, "x has ", x.dim(),
                    " dimensions and w_hh ", weights[1].dim(), ", expected 3 and 2");
    const int64_t t = x.size(0), b = x.size(1);
    const int64_t h = weights[1].size(0) / cell.gates, p = weights[1].size(1);
    const Check check(x);
    check("h0", h0, {layers, b, p});
    check("c0", c0, {layers, b, h});

    const Allocator make{x};
    const std::tuple result{make({t, b, p}), make({layers, b, p}),
                            make(cell.states > 1, {layers, b, h})};
    std::vector<Tensor> inner;  // that take turns
    for (int64_t k = 1; k < layers && k < 3; ++k) inner.push_back(make({t, b, p}));
    prefer_huge_pages(result);
    frnn::cpu::ForwardArgs<S> args{};
    for (int64_t k = 0; k < layers; ++k) {
      const Tensor& input = k == 0 ? x : inner[(k - 1) % 2];
      const Tensor& output = k + 1 == layers ? std::get<0>(result) : inner[k % 2];
      auto next = weights.begin() + static_cast<std::ptrdiff_t>(each) * k;
      const auto take = [&](bool there) { return there ? OptionalTensor(*next++) : std::nullopt; };
      const Tensor w_ih = *next++, w_hh = *next++;
      const OptionalTensor b_ih = take(biases), b_hh = take(biases), w_hr = take(projection);
      set_sequence(args, cell, "x", input, w_hh, w_hr, take(cell.params > 0), lengths, resets,
                   false);
      args.i = input.size(2);
      STD_TORCH_CHECK(args.i >= 1, "input size is 0, expected at least 1");
      check("x", input, {t, b, args.i});
      check("w_ih", w_ih, {cell.gates * h, args.i});
      check("w_hh", w_hh, {cell.gates * h, p});
      check("b_ih", b_ih, {cell.gates * h});
      check("b_hh", b_hh, {cell.gates * h});
      set_noise(args, cell, check, std::nullopt, std::nullopt, std::nullopt, 1, 1);
      read(args.x, input);
      read(args.w_ih, w_ih);
      read(args.b_ih, b_ih);
      read(args.b_hh, b_hh);
      args.h0 = static_cast<const S*>(h0.const_data_ptr()) + k * b * p;
      write(args.y, true, output);
      args.h_n = static_cast<S*>(std::get<1>(result).mutable_data_ptr()) + k * b * p;
      if (cell.states > 1) {
        args.c0 = static_cast<const S*>(c0->const_data_ptr()) + k * b * h;
        args.c_n = static_cast<S*>(std::get<2>(result).mutable_data_ptr()) + k * b * h;
      }
      frnn::cpu::forward(static_cast<int>(cell_index), args, torch_pool());
    }
    return result;
  });
}

// dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, of each row dparams, those of norm_ih and norm_hh and
// those of norm_c and norm_c_bias, dh0, dc0, of each row those of the states at resets; dgx, dgh
// and dh of all steps if the gates' gradients are wanted
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult recurrence_backward(
    OptionalTensor dy, OptionalTensor dc, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x,
    Tensor w_ih, Tensor w_hh, OptionalTensor w_hr, OptionalTensor params, Tensor h_prev,
    Tensor c_prev, Tensor saved, Tensor m, OptionalTensor lengths, OptionalTensor resets,
    OptionalTensor dropout, OptionalTensor renew_h, OptionalTensor renew_c, OptionalTensor norm_ih,
    OptionalTensor norm_hh, OptionalTensor norm_c, OptionalTensor norm_c_bias, Tensor kept,
    int64_t cell_index, bool reverse, bool reset_states, double rate_h, double rate_c, bool want_x,
    bool want_w_ih, bool want_w_hh, bool want_b_ih, bool want_b_hh, bool want_w_hr,
    bool want_gates) {
  return dispatch_stored("h_prev", h_prev, cell_index, [&]<class S>() {
    const frnn::CellFacts& cell = facts_of(cell_index);
    frnn::cpu::BackwardArgs<S> args{};
    auto [dparams, dh0, dc0] =
        prepare_backward(args, cell, kWide<S>, dy, dc, dh_n, dc_n, w_hh, w_hr, params, h_prev,
                         c_prev, saved, lengths, resets, reverse);
    const Check check(h_prev);
    STD_TORCH_CHECK(x.dim() == 3, "x has ", x.dim(), " dimensions, expected 3");
    args.i = x.size(2);
    const int64_t gates = cell.gates * args.h;
    check("x", x, {args.t, args.b, args.i});
    check("w_ih", w_ih, {gates, args.i});
    if (w_hr) check("m", m, {args.t, args.b, args.h});
    set_noise(args, cell, check, dropout, renew_h, renew_c, rate_h, rate_c);
    const NormTensors norms{norm_ih, norm_hh, norm_c, norm_c_bias};
    check("kept", kept, {size_of_norms(norms, args.t, args.b, gates, args.h)});
    set_norm(args.norm, norms, cell, check, args.t, args.b, args.h,
             static_cast<const frnn::Wide<S>*>(kept.const_data_ptr()));
    want_w_hr = want_w_hr && w_hr;

    const bool others = reset_states && cell.states > 1;
    const Allocator make{h_prev};
    const BackwardResult result{make(want_x, {args.t, args.b, args.i}),
                                make(want_w_ih, {gates, args.i}),
                                make(want_w_hh, {gates, args.p}),
                                make(want_b_ih, {gates}),
                                make(want_b_hh, {gates}),
                                make(want_w_hr, {args.p, args.h}),
                                dparams,
                                make(norm_ih.has_value(), {2, args.b, gates}),
                                make(norm_c.has_value(), {2, args.b, args.h}),
                                dh0,
                                dc0,
                                make(reset_states, {args.b, args.p}),
                                make(others, {cell.states - 1, args.b, args.h}),
                                make(want_gates, {args.t, args.b, gates}),
                                make(want_gates, {args.t, args.b, gates}),
                                make(want_gates && w_hr, {args.t, args.b, args.p})};
    prefer_huge_pages(result);
    read(args.x, x);
    read(args.w_ih, w_ih);
    if (w_hr) read(args.m, m);
    write(args.dx, want_x, std::get<0>(result));
    write(args.dw_ih, want_w_ih, std::get<1>(result));
    write(args.dw_hh, want_w_hh, std::get<2>(result));
    write(args.db_ih, want_b_ih, std::get<3>(result));
    write(args.db_hh, want_b_hh, std::get<4>(result));
    write(args.dw_hr, want_w_hr, std::get<5>(result));
    write(args.dgains, norm_ih.has_value(), std::get<7>(result));
    write(args.dnorm_c, norm_c.has_value(), std::get<8>(result));
    write(args.dreset.h, reset_states, std::get<11>(result));
    write(args.dreset.c, others, std::get<12>(result));
    write(args.kept.dgx, want_gates, std::get<13>(result));
    write(args.kept.dgh, want_gates, std::get<14>(result));
    write(args.kept.dh, want_gates && w_hr, std::get<15>(result));
    frnn::cpu::backward(static_cast<int>(cell_index), args, torch_pool());
    return result;
  });
}

template <class T>
frnn::cpu::UpdateArgs<T> update_args(const frnn::CellFacts& cell, const Tensor& gates,
                                     const Tensor& c, const OptionalTensor& params) {
  STD_TORCH_CHECK(c.dim() == 2, "c has ", c.dim(), " dimensions, expected 2");
  frnn::cpu::UpdateArgs<T> args{};
  args.b = c.size(0);
  args.h = c.size(1);
  const Check check(gates);
  check("gates", gates, {args.b, cell.gates, args.h});
  check("c", c, {args.b, args.h});
  check("params", params, {cell.params, args.h});
  STD_TORCH_CHECK(params.has_value() == (cell.params > 0), "params are ",
                  params ? "given" : "missing", ", but ", cell.name, " has ", cell.params);
  read(args.gates, gates);
  read(args.c, c);
  read(args.params, params);
  return args;
}

template <class T>
void run_update(int64_t cell_index, bool backward, const frnn::cpu::UpdateArgs<T>& args) {
  const int index = static_cast<int>(cell_index);
  STD_TORCH_CHECK(frnn::cpu::update(index, backward, args, torch_pool()),
                  frnn::cell_facts(index).name, " has no step of its own");
}

// h, c
std::tuple<Tensor, Tensor> cell_update(Tensor gates, Tensor c, OptionalTensor params,
                                       int64_t cell_index) {
  return dispatch("gates", gates, [&]<class T>() {
    auto args = update_args<T>(facts_of(cell_index), gates, c, params);
    const Allocator make{gates};
    const std::tuple result{make({args.b, args.h}), make({args.b, args.h})};
    write(args.h_new, true, std::get<0>(result));
    write(args.c_new, true, std::get<1>(result));
    run_update(cell_index, false, args);
    return result;
  });
}

// dgates, dc, dparams of each row
std::tuple<Tensor, Tensor, Tensor> cell_update_backward(Tensor gates, Tensor c,
                                                        OptionalTensor params, OptionalTensor dh,
                                                        OptionalTensor dc, int64_t cell_index) {
  return dispatch("gates", gates, [&]<class T>() {
    const frnn::CellFacts& cell = facts_of(cell_index);
    auto args = update_args<T>(cell, gates, c, params);
    const Check check(gates);
    check("dh", dh, {args.b, args.h});
    check("dc", dc, {args.b, args.h});
    const Allocator make{gates};
    const std::tuple result{make({args.b, cell.gates, args.h}), make({args.b, args.h}),
                            make(cell.params > 0, {cell.params, args.b, args.h})};
    read(args.dh, dh);
    read(args.dc, dc);
    write(args.dgates, true, std::get<0>(result));
    write(args.dc_prev, true, std::get<1>(result));
    write(args.dparams, cell.params > 0, std::get<2>(result));
    run_update(cell_index, true, args);
    return result;
  });
}

// Of the shape and type of `like`; `seed` holds one number.
Tensor mask(Tensor like, Tensor seed, int64_t threshold, double scale, int64_t place,
            int64_t kind) {
  Check{like}("seed", seed, {1}, ScalarType::Long);
  const auto fill = [&]<class T>() {
    const Tensor result = torch::stable::new_empty(like, like.sizes(), like.scalar_type());
    const int64_t key = *static_cast<const int64_t*>(seed.const_data_ptr());
    const frnn::cpu::MaskArgs<T> args{static_cast<T*>(result.mutable_data_ptr()),
                                      result.numel(),
                                      static_cast<uint64_t>(key),
                                      static_cast<uint32_t>(threshold),
                                      static_cast<T>(scale),
                                      static_cast<uint32_t>(place),
                                      static_cast<uint32_t>(kind)};
    frnn::cpu::mask(args, torch_pool());
    return result;
  };
  if (like.scalar_type() == ScalarType::Byte) return fill.template operator()<uint8_t>();
  return dispatch("like", like, fill);
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedrnn, library) {
  library.def(
      "recurrence_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? w_hr, Tensor? params, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, "
      "Tensor? h_reset, Tensor? c_reset, Tensor? dropout, Tensor? renew_h, Tensor? renew_c, "
      "Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_c_bias, int cell, "
      "bool reverse, bool training, bool cell_states, float rate_h, float rate_c) "
      "-> (Tensor y, Tensor h_n, "
      "Tensor c_n, Tensor c, Tensor h_prev, Tensor c_prev, Tensor saved, Tensor m, "
      "Tensor kept)");
  library.def(
      "recurrence_backward(Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor x, "
      "Tensor w_ih, Tensor w_hh, Tensor? w_hr, Tensor? params, Tensor h_prev, Tensor c_prev, "
      "Tensor saved, Tensor m, Tensor? lengths, Tensor? resets, Tensor? dropout, "
      "Tensor? renew_h, Tensor? renew_c, Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, "
      "Tensor? norm_c_bias, Tensor kept, int cell, bool reverse, bool reset_states, "
      "float rate_h, float rate_c, bool want_x, bool want_w_ih, bool want_w_hh, bool want_b_ih, "
      "bool want_b_hh, bool want_w_hr, bool want_gates) -> "
      "(Tensor dx, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dw_hr, "
      "Tensor dparams, Tensor dgains, Tensor dnorm_c, Tensor dh0, Tensor dc0, "
      "Tensor dh_reset, Tensor dc_reset, Tensor dgx, Tensor dgh, Tensor dh)");
  library.def(
      "stack_forward(Tensor x, Tensor[] weights, Tensor h0, Tensor? c0, Tensor? lengths, "
      "Tensor? resets, int cell, bool biases, bool projection) -> (Tensor y, Tensor h_n, "
      "Tensor c_n)");
  library.def(
      "cell_update(Tensor gates, Tensor c, Tensor? params, int cell) -> (Tensor h, Tensor c_new)");
  library.def(
      "cell_update_backward(Tensor gates, Tensor c, Tensor? params, Tensor? dh, Tensor? dc, "
      "int cell) -> (Tensor dgates, Tensor dc_prev, Tensor dparams)");
  library.def(
      "mask(Tensor like, Tensor seed, int threshold, float scale, int place, int kind) -> Tensor");
  // What the first two are made of on CUDA tensors; the implementations are in _C_cuda.so.
  library.def(
      "cuda_forward(Tensor gx, Tensor w_hh, Tensor? b_hh, Tensor? w_hr, Tensor h0, Tensor? c0, "
      "Tensor? lengths, Tensor? resets, int cell, bool reverse, bool training, bool cell_states, "
      "bool tf32) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor h_prev, Tensor c_prev, "
      "Tensor saved, Tensor m)");
  library.def(
      "cuda_backward(Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor w_hh, "
      "Tensor? w_hr, Tensor w_hh_t, Tensor? w_hr_t, Tensor h_prev, Tensor c_prev, Tensor saved, "
      "Tensor? lengths, Tensor? resets, int cell, bool reverse, bool tf32) -> (Tensor dgx, "
      "Tensor dgh, Tensor dh, Tensor dh0, Tensor dc0)");
  library.def(
      "cuda_forward_both(Tensor gx, Tensor w_hh, Tensor? b_hh, Tensor h0, Tensor? c0, "
      "Tensor gx_back, Tensor w_hh_back, Tensor? b_hh_back, Tensor h0_back, Tensor? c0_back, "
      "Tensor? lengths, Tensor? resets, int cell, bool training, bool cell_states, bool tf32) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor h_prev, Tensor c_prev, Tensor saved, "
      "Tensor m, Tensor y_back, Tensor h_n_back, Tensor c_n_back, Tensor c_back, "
      "Tensor h_prev_back, Tensor c_prev_back, Tensor saved_back, Tensor m_back)");
  library.def(
      "cuda_backward_both(Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor w_hh, "
      "Tensor w_hh_t, Tensor h_prev, Tensor c_prev, Tensor saved, Tensor? dy_back, "
      "Tensor? dc_back, Tensor? dh_n_back, Tensor? dc_n_back, Tensor w_hh_back, "
      "Tensor w_hh_t_back, Tensor h_prev_back, Tensor c_prev_back, Tensor saved_back, "
      "Tensor? lengths, Tensor? resets, int cell, bool tf32) -> (Tensor dgx, Tensor dgh, "
      "Tensor dh, Tensor dh0, Tensor dc0, Tensor dgx_back, Tensor dgh_back, Tensor dh_back, "
      "Tensor dh0_back, Tensor dc0_back)");
  library.def(
      "cuda_product(Tensor a, Tensor b, bool transpose_a, bool transpose_b, bool tf32) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, library) {
  library.impl("recurrence_forward", TORCH_BOX(&recurrence_forward));
  library.impl("recurrence_backward", TORCH_BOX(&recurrence_backward));
  library.impl("stack_forward", TORCH_BOX(&stack_forward));
  library.impl("mask", TORCH_BOX(&mask));
  library.impl("cell_update", TORCH_BOX(&cell_update));
  library.impl("cell_update_backward", TORCH_BOX(&cell_update_backward));
}

// By ctypes: the facts of the cells, one line each, the instruction sets, and the plans of the CUDA
// kernels, which need no device to be told.
#define FRNN_EXPORT extern "C" __attribute__((visibility("default")))

FRNN_EXPORT const char* frnn_cells() {
  static const std::string lines = [] {
    std::string all;
    for (int i = 0; i < frnn::cell_count(); ++i) {
      const frnn::CellFacts& cell = frnn::cell_facts(i);
      all += cell.name;
      for (const int fact : {cell.gates, cell.states, cell.saved, cell.params, int{cell.additive},
                             int{i < frnn::plain_cell_count()}}) {
        all += ' ';
        all += std::to_string(fact);
      }
      all += '\n';
    }
    return all;
  }();
  return lines.c_str();
}

// How the CUDA kernels divide a call, for a device that need not be here. plan: units and rows of a
// block, the numbers of blocks along units and rows of each direction, and how many directions run
// at once. Returns the algorithm.
FRNN_EXPORT int frnn_cuda_plan(int64_t rows, int64_t hidden, int64_t out, int gates, int arithmetic,
                               int projection, int backward, int sides, int multiprocessors,
                               int capability, int shared_memory, int64_t* plan) {
  using namespace frnn::cuda;
  const Call call{rows,          hidden,          out,  gates, static_cast<Arithmetic>(arithmetic),
                  backward != 0, projection != 0, sides};
  const Choice choice = choose(call, {multiprocessors, capability, shared_memory});
  if (choice.algorithm == Algorithm::kCluster) {
    const ClusterShape& shape = choice.cluster;
    plan[0] = shape.units;
    plan[1] = int64_t{shape.tiles} * kTileColumns;
    plan[2] = shape.blocks;
    plan[3] = shape.clusters;
  } else if (choice.algorithm == Algorithm::kGrid) {
    const GridShape& shape = choice.grid;
    plan[0] = kGridUnits;
    plan[1] = int64_t{shape.tiles} * kTileColumns;
    plan[2] = shape.blocks;
    plan[3] = shape.teams;
  } else {
    const auto [shape, blocks] = plan_of(rows, backward ? out : hidden, backward ? 1 : gates,
                                         call.arithmetic, multiprocessors);
    plan[0] = int64_t{shape.groups} * kSlotRows;
    plan[1] = int64_t{shape.tiles} * kTileColumns;
    plan[2] = blocks.y;
    plan[3] = blocks.x;
  }
  plan[4] = choice.sides;
  return static_cast<int>(choice.algorithm);
}

FRNN_EXPORT const char* frnn_isa() { return frnn::cpu::isa(); }
FRNN_EXPORT const char* frnn_isas() { return frnn::cpu::isas(); }
FRNN_EXPORT int frnn_stores_bfloat16(int cell) { return frnn::cpu::stores_bfloat16(cell); }
FRNN_EXPORT int frnn_set_isa(const char* name) { return frnn::cpu::set_isa(name); }
