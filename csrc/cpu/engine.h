// SPDX-License-Identifier: Apache-2.0
// One engine per instruction set: the same text (recurrence.inl) compiled with other flags.
#pragma once

#include "recurrence.h"

namespace frnn::cpu {

// Of values stored as S whose products are made on tiles; cells with late gates have none.
template <class S>
struct TileEngine {
  void (*forward)(int cell, const ForwardArgs<S>&, const Pool&);
  void (*backward)(int cell, const BackwardArgs<S>&, const Pool&);
};

struct Engine {
  const char* name;
  void (*forward_f32)(int cell, const ForwardArgs<float>&, const Pool&);
  void (*forward_f64)(int cell, const ForwardArgs<double>&, const Pool&);
  void (*backward_f32)(int cell, const BackwardArgs<float>&, const Pool&);
  void (*backward_f64)(int cell, const BackwardArgs<double>&, const Pool&);
  bool (*update_f32)(int cell, bool backward, const UpdateArgs<float>&, const Pool&);
  bool (*update_f64)(int cell, bool backward, const UpdateArgs<double>&, const Pool&);
  void (*mask_f32)(const MaskArgs<float>&, const Pool&);
  void (*mask_f64)(const MaskArgs<double>&, const Pool&);
  void (*mask_u8)(const MaskArgs<uint8_t>&, const Pool&);
};

extern const Engine kBaseEngine;
extern const Engine kAvx2Engine;    // x86-64 only
extern const Engine kAvx512Engine;  // x86-64 only
// If FRNN_AMX.
extern const TileEngine<BFloat16> kAmxBFloat16;
extern const TileEngine<float> kAmxFloat;

}  // namespace frnn::cpu
