// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels as ops on tensors. What is CUDA's own within libtorch is looked up at the first
// call, so that the library loads beside any PyTorch, and without a driver.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings.h"
#include "cuda/kernels.h"

namespace {

using namespace frnn::bindings;
using frnn::cuda::Arithmetic;

// A function of libtorch_cuda.so or of a library that it is linked to, such as cuBLAS.
template <class F>
F* of_torch_cuda(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function = library ? dlsym(library, name) : nullptr;
  STD_TORCH_CHECK(function, "this PyTorch has no ", name, " in libtorch_cuda.so");
  return reinterpret_cast<F*>(function);
}

// Makes the device of a tensor the current one for a call.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(tensor.get_device_index()) {}

  void* stream() const {
    static auto* const get =
        of_torch_cuda<AOTITorchError(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(get(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

Arithmetic arithmetic_of(const char* what, const Tensor& tensor, bool tf32) {
  const ScalarType type = tensor.scalar_type();
  switch (type) {
    case ScalarType::Half:
      return Arithmetic::kFloat16;
    case ScalarType::BFloat16:
      return Arithmetic::kBfloat16;
    case ScalarType::Float:
      return tf32 ? Arithmetic::kTf32 : Arithmetic::kFloat32;
    case ScalarType::Double:
      return Arithmetic::kFloat64;
    default:
      STD_TORCH_CHECK(false, what, " is ", text(type),
                      ", expected float16, bfloat16, float32 or float64");
  }
}

// The type A of recurrence.h.
ScalarType wide_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const frnn::CellFacts& plain_facts_of(int64_t cell) {
  const frnn::CellFacts& facts = facts_of(cell);
  STD_TORCH_CHECK(cell < frnn::plain_cell_count(), facts.name, " has no CUDA kernels");
  return facts;
}

// Both directions have the same sizes, dtype and device.
void check_alike(const char* what, const Tensor& one, const Tensor& other) {
  Check{one}(what, other, {one.size(0), one.size(1), one.size(2)});
}

// One direction: its arguments, what it gives, and what it needs as long as the call lasts.
struct ForwardSide {
  frnn::cuda::Forward<void, void> args;
  ForwardResult result;
  std::tuple<Tensor, Tensor, Tensor> between;
};

ForwardSide forward_side(const frnn::CellFacts& cell, const Tensor& gx, const Tensor& w_hh,
                         const OptionalTensor& b_hh, const OptionalTensor& w_hr, const Tensor& h0,
                         const OptionalTensor& c0, const OptionalTensor& lengths,
                         const OptionalTensor& resets, bool reverse, bool training,
                         bool cell_states) {
  const ScalarType wide = wide_type(gx);
  frnn::cuda::Forward<void, void> args{};
  ForwardResult result = prepare_forward(args, cell, wide, "gx", gx, w_hh, b_hh, w_hr, std::nullopt,
                                         h0, c0, lengths, resets, reverse, training, cell_states);
  const int64_t others = cell.states - 1, b = args.b, h = args.h, p = args.p;
  Check{gx}("gx", gx, {args.t, b, cell.gates * h});
  read(args.gx, gx);

  const Allocator make{gx};
  const bool inference = !training, inner = inference && w_hr;
  const Tensor h_step = make(inference, {2, b, p});
  const Tensor states_step = make(inference && others > 0, {others, b, h}, wide);
  const Tensor m_step = make(inner, {b, h});
  write(args.h_step, inference, h_step);
  write(args.states_step, inference && others > 0, states_step);
  write(args.m_step, inner, m_step);
  return {args, result, {h_step, states_step, m_step}};
}

void run_forward(int64_t cell, Arithmetic arithmetic, frnn::cuda::ForwardSides sides,
                 const Tensor& like, void* stream) {
  const int64_t bytes =
      frnn::cuda::forward_exchange_bytes(static_cast<int>(cell), arithmetic, sides);
  const Tensor exchange = Allocator{like}(bytes > 0, {bytes}, ScalarType::Byte);
  write(sides.exchange, bytes > 0, exchange);
  frnn::cuda::forward(static_cast<int>(cell), arithmetic, sides, stream);
}

ForwardResult cuda_forward(Tensor gx, Tensor w_hh, OptionalTensor b_hh, OptionalTensor w_hr,
                           Tensor h0, OptionalTensor c0, OptionalTensor lengths,
                           OptionalTensor resets, int64_t cell, bool reverse, bool training,
                           bool cell_states, bool tf32) {
  const Arithmetic arithmetic = arithmetic_of("gx", gx, tf32);
  const frnn::CellFacts& facts = plain_facts_of(cell);
  const OnDevice device(gx);
  const ForwardSide side = forward_side(facts, gx, w_hh, b_hh, w_hr, h0, c0, lengths, resets,
                                        reverse, training, cell_states);
  run_forward(cell, arithmetic, {{side.args}, 1}, gx, device.stream());
  return side.result;
}

// Both directions of a layer without projection: the results of the one, then of the other.
auto cuda_forward_both(Tensor gx, Tensor w_hh, OptionalTensor b_hh, Tensor h0, OptionalTensor c0,
                       Tensor gx_back, Tensor w_hh_back, OptionalTensor b_hh_back, Tensor h0_back,
                       OptionalTensor c0_back, OptionalTensor lengths, OptionalTensor resets,
                       int64_t cell, bool training, bool cell_states, bool tf32) {
  const Arithmetic arithmetic = arithmetic_of("gx", gx, tf32);
  const frnn::CellFacts& facts = plain_facts_of(cell);
  const OnDevice device(gx);
  const ForwardSide one = forward_side(facts, gx, w_hh, b_hh, std::nullopt, h0, c0, lengths, resets,
                                       false, training, cell_states);
  const ForwardSide other =
      forward_side(facts, gx_back, w_hh_back, b_hh_back, std::nullopt, h0_back, c0_back, lengths,
                   resets, true, training, cell_states);
  check_alike("gx", gx, gx_back);
  run_forward(cell, arithmetic, {{one.args, other.args}, 2}, gx, device.stream());
  return std::tuple_cat(one.result, other.result);
}

// dgx, dgh, dh, dh0, dc0
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct BackwardSide {
  frnn::cuda::Backward<void, void> args;
  BackwardResult result;
};

BackwardSide backward_side(const frnn::CellFacts& cell, const OptionalTensor& dy,
                           const OptionalTensor& dc, const OptionalTensor& dh_n,
                           const OptionalTensor& dc_n, const Tensor& w_hh,
                           const OptionalTensor& w_hr, const Tensor& w_hh_t,
                           const OptionalTensor& w_hr_t, const Tensor& h_prev, const Tensor& c_prev,
                           const Tensor& saved, const OptionalTensor& lengths,
                           const OptionalTensor& resets, bool reverse) {
  frnn::cuda::Backward<void, void> args{};
  auto [_, dh0, dc0] =
      prepare_backward(args, cell, wide_type(h_prev), dy, dc, dh_n, dc_n, w_hh, w_hr, std::nullopt,
                       h_prev, c_prev, saved, lengths, resets, reverse);
  const Check check(h_prev);
  const int64_t gates = cell.gates * args.h;
  check("w_hh_t", w_hh_t, {args.p, gates});
  check("w_hr_t", w_hr_t, {args.h, args.p});
  STD_TORCH_CHECK(w_hr.has_value() == w_hr_t.has_value(), "only one of w_hr and w_hr_t is given");
  read(args.w_hh_t, w_hh_t);
  read(args.w_hr_t, w_hr_t);

  const Allocator make{h_prev};
  const Tensor dgx = make({args.t, args.b, gates});
  const Tensor dgh = make(!cell.additive, {args.t, args.b, gates});
  const Tensor dh = make(w_hr.has_value(), {args.t, args.b, args.p});
  write(args.dgx, true, dgx);
  write(args.dgh, true, cell.additive ? dgx : dgh);
  write(args.dh, w_hr.has_value(), dh);
  return {args, {dgx, dgh, dh, dh0, dc0}};
}

void run_backward(int64_t cell, Arithmetic arithmetic, frnn::cuda::BackwardSides sides,
                  const Tensor& like, void* stream) {
  const int64_t bytes =
      frnn::cuda::backward_exchange_bytes(static_cast<int>(cell), arithmetic, sides);
  const Tensor exchange = Allocator{like}(bytes > 0, {bytes}, ScalarType::Byte);
  write(sides.exchange, bytes > 0, exchange);
  frnn::cuda::backward(static_cast<int>(cell), arithmetic, sides, stream);
}

BackwardResult cuda_backward(OptionalTensor dy, OptionalTensor dc, OptionalTensor dh_n,
                             OptionalTensor dc_n, Tensor w_hh, OptionalTensor w_hr, Tensor w_hh_t,
                             OptionalTensor w_hr_t, Tensor h_prev, Tensor c_prev, Tensor saved,
                             OptionalTensor lengths, OptionalTensor resets, int64_t cell,
                             bool reverse, bool tf32) {
  const Arithmetic arithmetic = arithmetic_of("h_prev", h_prev, tf32);
  const frnn::CellFacts& facts = plain_facts_of(cell);
  const OnDevice device(h_prev);
  const BackwardSide side = backward_side(facts, dy, dc, dh_n, dc_n, w_hh, w_hr, w_hh_t, w_hr_t,
                                          h_prev, c_prev, saved, lengths, resets, reverse);
  run_backward(cell, arithmetic, {{side.args}, 1}, h_prev, device.stream());
  return side.result;
}

auto cuda_backward_both(OptionalTensor dy, OptionalTensor dc, OptionalTensor dh_n,
                        OptionalTensor dc_n, Tensor w_hh, Tensor w_hh_t, Tensor h_prev,
                        Tensor c_prev, Tensor saved, OptionalTensor dy_back, OptionalTensor dc_back,
                        OptionalTensor dh_n_back, OptionalTensor dc_n_back, Tensor w_hh_back,
                        Tensor w_hh_t_back, Tensor h_prev_back, Tensor c_prev_back,
                        Tensor saved_back, OptionalTensor lengths, OptionalTensor resets,
                        int64_t cell, bool tf32) {
  const Arithmetic arithmetic = arithmetic_of("h_prev", h_prev, tf32);
  const frnn::CellFacts& facts = plain_facts_of(cell);
  const OnDevice device(h_prev);
  const BackwardSide one =
      backward_side(facts, dy, dc, dh_n, dc_n, w_hh, std::nullopt, w_hh_t, std::nullopt, h_prev,
                    c_prev, saved, lengths, resets, false);
  const BackwardSide other = backward_side(facts, dy_back, dc_back, dh_n_back, dc_n_back, w_hh_back,
                                           std::nullopt, w_hh_t_back, std::nullopt, h_prev_back,
                                           c_prev_back, saved_back, lengths, resets, true);
  check_alike("h_prev", h_prev, h_prev_back);
  run_backward(cell, arithmetic, {{one.args, other.args}, 2}, h_prev, device.stream());
  return std::tuple_cat(one.result, other.result);
}

// a b, or of their transposes, in float32. PyTorch's own products read their precision from a
// setting of the whole process; cuBLAS takes it from a handle that is this thread's own, and that
// PyTorch sets anew whenever it hands it out.
Tensor cuda_product(Tensor a, Tensor b, bool transpose_a, bool transpose_b, bool tf32) {
  enum Operation { kAsItIs = 0, kTransposed = 1 };    // cublasOperation_t
  enum MathMode { kDefaultMath = 0, kTf32Math = 3 };  // cublasMath_t
  using Gemm = int(void*, int, int, int64_t, int64_t, int64_t, const float*, const float*, int64_t,
                   const float*, int64_t, const float*, float*, int64_t);
  static auto* const get_handle =
      of_torch_cuda<AOTITorchError(void**)>("torch_get_current_cuda_blas_handle");
  static auto* const set_math_mode = of_torch_cuda<int(void*, int)>("cublasSetMathMode");
  static auto* const gemm = of_torch_cuda<Gemm>("cublasSgemm_v2_64");

  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a has ", a.dim(), " dimensions and b ", b.dim(),
                  ", expected 2");
  const int64_t m = a.size(transpose_a), k = a.size(!transpose_a), n = b.size(!transpose_b);
  const Check check(a);
  check("a", a, {a.size(0), a.size(1)}, ScalarType::Float);
  check("b", b, {transpose_b ? n : k, transpose_b ? k : n});
  STD_TORCH_CHECK(m > 0 && n > 0 && k > 0, "the product is [", m, ", ", k, "] [", k, ", ", n,
                  "], expected no dimension of size 0");

  const OnDevice device(a);
  const Tensor c = Allocator{a}({m, n});
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_handle(&handle));
  const float one = 1, zero = 0;
  int error = set_math_mode(handle, tf32 ? kTf32Math : kDefaultMath);
  // cuBLAS is column-major, where row-major matrices are their transposes: c' = b' a'.
  if (error == 0) {
    error = gemm(handle, transpose_b ? kTransposed : kAsItIs, transpose_a ? kTransposed : kAsItIs,
                 n, m, k, &one, static_cast<const float*>(b.const_data_ptr()), b.size(1),
                 static_cast<const float*>(a.const_data_ptr()), a.size(1), &zero,
                 static_cast<float*>(c.mutable_data_ptr()), n);
  }
  STD_TORCH_CHECK(error == 0, "cuBLAS failed with status ", error);
  return c;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, library) {
  library.impl("cuda_forward", TORCH_BOX(&cuda_forward));
  library.impl("cuda_backward", TORCH_BOX(&cuda_backward));
  library.impl("cuda_forward_both", TORCH_BOX(&cuda_forward_both));
  library.impl("cuda_backward_both", TORCH_BOX(&cuda_backward_both));
  library.impl("cuda_product", TORCH_BOX(&cuda_product));
}
