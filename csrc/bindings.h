// SPDX-License-Identifier: Apache-2.0
// What the ops of all devices share: checks, allocation, and the arguments that come from tensors.
// The bindings alone see torch, and only its stable ABI.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "recurrence.h"

namespace frnn::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

inline std::string text(const int64_t* sizes, int64_t n) {
  std::string s = "[";
  for (int64_t i = 0; i < n; ++i) {
    if (i > 0) s += ", ";
    s += std::to_string(sizes[i]);
  }
  s += ']';
  return s;
}

inline const char* text(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

inline std::string text(const Device& device) {
  if (device.is_cpu()) return "the CPU";
  return (device.is_cuda() ? "CUDA device " : "device ") + std::to_string(device.index());
}

// Every tensor of a call has the dtype and device of its first one, and is contiguous.
class Check {
 public:
  explicit Check(const Tensor& first) : type_(first.scalar_type()), device_(first.device()) {}

  ScalarType type() const { return type_; }

  void operator()(const char* what, const Tensor& tensor, Sizes sizes) const {
    (*this)(what, tensor, sizes, type_);
  }
  void operator()(const char* what, const Tensor& tensor, Sizes sizes, ScalarType type) const {
    const auto got = tensor.sizes();
    bool same = got.size() == sizes.size();
    for (size_t i = 0; same && i < sizes.size(); ++i) same = got[i] == sizes.begin()[i];
    STD_TORCH_CHECK(same, what, " has shape ", text(got.data(), got.size()), ", expected ",
                    text(sizes.begin(), sizes.size()));
    STD_TORCH_CHECK(tensor.scalar_type() == type, what, " is ", text(tensor.scalar_type()),
                    ", expected ", text(type));
    STD_TORCH_CHECK(here(tensor.device()), what, " is on ", text(tensor.device()), ", expected ",
                    text(device_));
    STD_TORCH_CHECK(tensor.is_contiguous(), what, " is not contiguous");
  }
  template <class... Type>
  void operator()(const char* what, const OptionalTensor& tensor, Sizes sizes, Type... type) const {
    if (tensor) (*this)(what, *tensor, sizes, type...);
  }

 private:
  bool here(const Device& device) const {
    return device == device_ ||
           (device.is_cpu() && device_.is_cpu());  // whose index may be left out
  }

  ScalarType type_;
  Device device_;
};

// Allocates results like one of the inputs; those that do not apply are empty.
struct Allocator {
  const Tensor& like;

  Tensor operator()(bool needed, Sizes sizes, ScalarType type) const {
    const int64_t none[] = {0};
    return needed ? torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type)
                  : torch::stable::new_empty(like, {none, 1}, type);
  }
  Tensor operator()(bool needed, Sizes sizes) const {
    return (*this)(needed, sizes, like.scalar_type());
  }
  Tensor operator()(Sizes sizes) const { return (*this)(true, sizes); }
};

template <class T>
void read(const T*& p, const OptionalTensor& tensor) {
  p = tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
void write(T*& p, bool needed, const Tensor& tensor) {
  p = needed ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

inline const CellFacts& facts_of(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell < cell_count(), "cell is ", cell, ", expected 0 to ",
                  cell_count() - 1);
  return cell_facts(static_cast<int>(cell));
}

// The letters, from the first argument [T, B, ...] and w_hh [G*H, P], and what both directions
// share.
template <class Args>
void set_sequence(Args& args, const CellFacts& cell, const char* what, const Tensor& first,
                  const Tensor& w_hh, const OptionalTensor& w_hr, const OptionalTensor& params,
                  const OptionalTensor& lengths, const OptionalTensor& resets, bool reverse) {
  STD_TORCH_CHECK(first.dim() == 3 && w_hh.dim() == 2, what, " has ", first.dim(),
                  " dimensions and w_hh ", w_hh.dim(), ", expected 3 and 2");
  args.t = first.size(0);
  args.b = first.size(1);
  args.h = w_hh.size(0) / cell.gates;
  args.p = w_hh.size(1);
  const Check check(first);
  check("w_hh", w_hh, {cell.gates * args.h, args.p});
  check("w_hr", w_hr, {args.p, args.h});
  check("params", params, {cell.params, args.h});
  check("lengths", lengths, {args.b}, ScalarType::Long);
  check("resets", resets, {args.t, args.b}, ScalarType::Bool);
  STD_TORCH_CHECK(args.h >= 1 && args.p >= 1, "hidden size is ", args.h, ", output size is ",
                  args.p, ", expected at least 1");
  STD_TORCH_CHECK(w_hr || args.p == args.h, "output size is ", args.p,
                  " without w_hr, expected the hidden size ", args.h);
  STD_TORCH_CHECK(!w_hr || !cell.reads_h, "w_hr is given, but ", cell.name, " has no projection");
  STD_TORCH_CHECK(params.has_value() == (cell.params > 0), "params are ",
                  params ? "given" : "missing", ", but ", cell.name, " has ", cell.params);
  args.reverse = reverse;
  read(args.w_hh, w_hh);
  read(args.w_hr, w_hr);
  read(args.params, params);
  read(args.lengths, lengths);
  read(args.resets, resets);
}

// y, h_n, c_n, c, h_prev, c_prev, saved, m
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// All arguments of forward but those of the input projection, and its results; `wide` is the type
// A of recurrence.h.
template <class Args>
ForwardResult prepare_forward(Args& args, const CellFacts& cell, ScalarType wide, const char* what,
                              const Tensor& first, const Tensor& w_hh, const OptionalTensor& b_hh,
                              const OptionalTensor& w_hr, const OptionalTensor& params,
                              const Tensor& h0, const OptionalTensor& c0,
                              const OptionalTensor& lengths, const OptionalTensor& resets,
                              bool reverse, bool training, bool cell_states) {
  set_sequence(args, cell, what, first, w_hh, w_hr, params, lengths, resets, reverse);
  const int64_t s = cell.states, t = args.t, b = args.b, h = args.h, p = args.p;
  const Check check(first);
  check("b_hh", b_hh, {cell.gates * h});
  check("h0", h0, {b, p});
  check("c0", c0, {s - 1, b, h});
  STD_TORCH_CHECK(c0.has_value() == (s > 1), "c0 is ", c0 ? "given" : "missing", ", but ",
                  cell.name, " has ", s, " state(s)");
  STD_TORCH_CHECK(!cell_states || s > 1, "cell_states is true, but ", cell.name,
                  " has only one state");

  const Allocator make{first};
  const bool others = s > 1, inner = training && w_hr;
  ForwardResult result{make({t, b, p}),
                       make({b, p}),
                       make(others, {s - 1, b, h}),
                       make(cell_states, {t, b, h}),
                       make(training, {t, b, p}),
                       make(training && others, {s - 1, t, b, h}, wide),
                       make(training, {cell.saved, t, b, h}),
                       make(inner, {t, b, h})};
  const auto& [y, h_n, c_n, c, h_prev, c_prev, saved, m] = result;
  read(args.b_hh, b_hh);
  read(args.h0, h0);
  read(args.c0, c0);
  write(args.y, true, y);
  write(args.h_n, true, h_n);
  write(args.c_n, others, c_n);
  write(args.c, cell_states, c);
  write(args.h_prev, training, h_prev);
  write(args.c_prev, training && others, c_prev);
  write(args.saved, training, saved);
  write(args.m, inner, m);
  return result;
}

// What backward reads, the same for all devices, and [dparams, dh0, dc0].
template <class Args>
std::tuple<Tensor, Tensor, Tensor> prepare_backward(
    Args& args, const CellFacts& cell, ScalarType wide, const OptionalTensor& dy,
    const OptionalTensor& dc, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const Tensor& w_hh, const OptionalTensor& w_hr, const OptionalTensor& params,
    const Tensor& h_prev, const Tensor& c_prev, const Tensor& saved, const OptionalTensor& lengths,
    const OptionalTensor& resets, bool reverse) {
  set_sequence(args, cell, "h_prev", h_prev, w_hh, w_hr, params, lengths, resets, reverse);
  const int64_t s = cell.states, t = args.t, b = args.b, h = args.h, p = args.p;
  const Check check(h_prev);
  check("dy", dy, {t, b, p});
  check("dc", dc, {t, b, h});
  check("dh_n", dh_n, {b, p});
  check("dc_n", dc_n, {s - 1, b, h});
  check("h_prev", h_prev, {t, b, p});
  if (s > 1) check("c_prev", c_prev, {s - 1, t, b, h}, wide);
  check("saved", saved, {cell.saved, t, b, h});
  STD_TORCH_CHECK(s > 1 || (!dc && !dc_n), "dc or dc_n is given, but ", cell.name,
                  " has only one state");

  const Allocator make{h_prev};
  std::tuple result{make(cell.params > 0, {cell.params, b, h}, wide), make(true, {b, p}, wide),
                    make(s > 1, {s - 1, b, h}, wide)};
  const auto& [dparams, dh0, dc0] = result;
  read(args.dy, dy);
  read(args.dc, dc);
  read(args.dh_n, dh_n);
  read(args.dc_n, dc_n);
  read(args.h_prev, h_prev);
  read(args.c_prev, c_prev);
  read(args.saved, saved);
  write(args.dparams, cell.params > 0, dparams);
  write(args.dh0, true, dh0);
  write(args.dc0, s > 1, dc0);
  return result;
}

}  // namespace frnn::bindings
