// SPDX-License-Identifier: Apache-2.0
// An engine of all that recurrence.inl has. Included by recurrence_<isa>.cpp in its place.
#include "cpu/recurrence.inl"

namespace {

constexpr frnn::cpu::Engine make_engine(const char* name) {
  return {.name = name,
          .forward_f32 = run_forward<float>,
          .forward_f64 = run_forward<double>,
          .backward_f32 = run_backward<float>,
          .backward_f64 = run_backward<double>,
          .update_f32 = run_update<float>,
          .update_f64 = run_update<double>,
          .mask_f32 = run_mask<float>,
          .mask_f64 = run_mask<double>,
          .mask_u8 = run_mask<uint8_t>};
}

}  // namespace
