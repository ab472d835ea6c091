// SPDX-License-Identifier: Apache-2.0
// The C++ interface of the engines: one layer, one direction.
//
// Letters: T time, B batch, H hidden, P output size (= H without projection), G gates, S states,
// R saved planes, K parameters of a unit beside the weights. All arrays are dense, row-major, in
// the order of their bracketed shape; all belong to the caller, are only used during the call, and
// do not overlap. "or null" marks what may be absent. Step t of row b is *computed* when t <
// lengths[b]; a row of length 0 has no step.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace frnn {

struct CellFacts {
  const char* name;
  int gates, states, saved, params, late;
  bool additive;          // gx and gh only meet as their sum, so that dgx == dgh
  bool reads_h;           // h_prev reaches h around W_hh too; excludes a projection
  bool normalises_state;  // the second state may be normalised on its way into h
};

int cell_count();
int plain_cell_count();  // of which the first ones are torch.nn's, those with CUDA kernels
const CellFacts& cell_facts(int cell);  // 0 <= cell < cell_count()

// What forward and backward have in common. As types, S is that of storage and A that of cell
// states and running gradients between steps, wider where S has 16 bits.
template <class S>
struct SequenceArgs {
  int64_t t, b, h, p;      // T, B, H, P; T and B may be 0
  bool reverse;            // run from each row's end to its beginning
  const S* w_hh;           // [G*H, P] in
  const S* w_hr;           // [P, H] in, or null (then P == H)
  const S* params;         // [K, H] in, or null if K == 0
  const int64_t* lengths;  // [B] in, or null = T; values beyond [0, T] are clamped
  const bool* resets;      // [T, B] in, or null; true: nothing passes between t-1 and t
};

template <class S, class A = S>
struct ForwardArgs : SequenceArgs<S> {
  int64_t i;      // I
  const S* x;     // [T, B, I] in; what it holds at steps not computed reaches no result
  const S* w_ih;  // [G*H, I] in
  const S* b_ih;  // [G*H] in, or null
  const S* b_hh;  // [G*H] in, or null
  const S* h0;    // [B, P] in
  const S* c0;    // [S-1, B, H] in, or null if S == 1

  S* y;    // [T, B, P] out, 0 at steps not computed
  S* h_n;  // [B, P] out, the state after each row's own last step (h0 if it has none)
  S* c_n;  // [S-1, B, H] out, or null if S == 1
  S* c;    // [T, B, H] out, or null: the second state at every step, 0 where not computed

  // For backward, all or none; at steps not computed 0, or on the CPU unset.
  S* h_prev;  // [T, B, P] out, or null: the h that entered the step
  A* c_prev;  // [S-1, T, B, H] out, or null: the other states that entered it
  S* saved;   // [R, T, B, H] out, or null: what the cell saves
  S* m;       // [T, B, H] out, or null: the cell's h before the projection
};

template <class S, class A = S>
struct BackwardArgs : SequenceArgs<S> {
  const S* dy;    // [T, B, P] in, or null = 0; not read at steps not computed
  const S* dc;    // [T, B, H] in, or null = 0; likewise
  const S* dh_n;  // [B, P] in, or null = 0
  const S* dc_n;  // [S-1, B, H] in, or null = 0

  const S* h_prev;  // as forward left them
  const A* c_prev;
  const S* saved;

  A* dh0;      // [B, P] out; also holds the running gradient during the call
  A* dc0;      // [S-1, B, H] out, or null if S == 1; likewise
  A* dparams;  // [K, B, H] out, or null if K == 0: of each row, summed over its steps
};

// What regularises a recurrence from within, on the CPU alone. A new value's share is 1 where there
// is no zoneout.
template <class S>
struct Noise {
  const S* dropout;        // [B, P] in, or null: what h is multiplied by on its way into W_hh
  const uint8_t* renew_h;  // [T, B, P] in, or null: 0 where h keeps the value it had before, else 1
  const uint8_t* renew_c;  // [T, B, H] in, or null: likewise the second state
  S rate_h, rate_c;        // the new values' share where there is no such array
};

// Of the states that enter where a reset is, on the CPU alone; null: zeros do.
template <class S>
struct ResetStates {
  S* h;  // [P] in, in backward their gradients for each row, summed over its steps: [B, P] out
  S* c;  // [S-1, H] in, or null if S == 1; in backward [S-1, B, H] out
};

// Layer norm (Ba et al. 2016), on the CPU alone: W_ih x and W_hh h, each over all G*H numbers of a
// row and step, are shifted and scaled to a mean of 0 and a variance of 1 (their hat), and have
// gains in place; so, with a bias too, has the second state on its way into h, over its H. E is S,
// const in backward.
template <class S, class E>
struct Norm {
  const S* gain_ih;  // [G*H] in, or null: there is no norm
  const S* gain_hh;  // [G*H] in
  const S* gain_c;   // [H] in, or null: the second state is taken as it is
  const S* bias_c;   // [H] in

  // For backward, all or none.
  E* hat_ih;  // [T, B, G*H] out
  E* hat_hh;  // [T, B, G*H] out
  E* hat_c;   // [T, B, H] out, if it is normalised
  E* scale;   // [3, T, B] out: one over the standard deviation of each of them
};

// Where a step leaves the gradients that products take up.
template <class S>
struct StepGradients {
  S* dgx;  // [B, G*H] out, at rows not computed 0, or on the CPU unset
  S* dgh;  // [B, G*H] out; the same pointer as dgx for additive cells
  S* dh;   // [B, P] out, or null if the cells are not apart: the whole gradient of h

  // Where the gates of a unit begin, of G gates of H units a row, and how far apart they are.
  FRNN_FN static int64_t first(int64_t row, int64_t unit, int gates, int64_t h) {
    return row * (gates * h) + unit;
  }
  FRNN_FN static int64_t apart(int64_t h) { return h; }

  // Of n units from there on.
  template <class Cell, class V>
  FRNN_FN void keep(int64_t row, int64_t unit, int n, int64_t h, const V* of_x,
                    const V* of_h) const {
    const int64_t begin = first(row, unit, Cell::kGates, h);
    for (int g = 0; g < Cell::kGates; ++g) {
      store(dgx + begin + g * h, of_x[g], n);
      if (!Cell::kAdditive) store(dgh + begin + g * h, of_h[g], n);
    }
  }
};

namespace cpu {

// The caller's thread pool. run() calls body on disjoint ranges that cover [0, n), each in its own
// thread and all at the same time, but not necessarily n of them: one call with [0, n) is fine.
struct Pool {
  int threads;
  void (*run)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

// Storage in bfloat16 is without all three.
template <class S>
struct ForwardArgs : frnn::ForwardArgs<S, Wide<S>> {
  ResetStates<const S> reset;
  Noise<Wide<S>> noise;
  Norm<Wide<S>, Wide<S>> norm;
};

// Backward with the products that follow it; results that are not wanted are null.
template <class S>
struct BackwardArgs : frnn::BackwardArgs<S, Wide<S>> {
  int64_t i;      // I
  const S* x;     // [T, B, I] in; what it holds at steps not computed reaches no result
  const S* w_ih;  // [G*H, I] in
  const S* m;     // [T, B, H] in, as forward left it, or null without projection
  ResetStates<S> dreset;
  Noise<Wide<S>> noise;
  Norm<Wide<S>, const Wide<S>> norm;

  S* dx;     // [T, B, I] out, or null
  S* dw_ih;  // [G*H, I] out, or null
  S* dw_hh;  // [G*H, P] out, or null
  S* db_ih;  // [G*H] out, or null
  S* db_hh;  // [G*H] out, or null
  S* dw_hr;  // [P, H] out, or null

  // [2, B, G*H] out, or null without norm: of gain_ih and gain_hh, of each row
  Wide<S>* dgains;
  Wide<S>* dnorm_c;       // [2, B, H] out, or null: of gain_c and bias_c, of each row
  StepGradients<S> kept;  // of all steps, [T, B, ..] out, or null
};

// One step of a cell alone that has the states h and c, is additive and does not read h.
template <class S>
struct UpdateArgs {
  int64_t b, h;     // B, H
  const S* gates;   // [B, G, H] in: gx + gh
  const S* c;       // [B, H] in
  const S* params;  // [K, H] in, or null if K == 0

  S* h_new;  // [B, H] out, of forward
  S* c_new;

  const S* dh;  // [B, H] in, of backward, or null = 0
  const S* dc;
  S* dgates;   // [B, G, H] out, of backward
  S* dc_prev;  // [B, H]
  S* dparams;  // [K, B, H] out, or null if K == 0: of each row
};

// A mask of dropout or zoneout, by philox.h.
template <class T>
struct MaskArgs {
  T* mask;  // [count] out: element i is from word i % 4 of the counter (i / 4, place, kind)
  int64_t count;
  uint64_t seed;
  uint32_t threshold;  // a word under it gives 0
  T scale;             // what others give
  uint32_t place, kind;
};

void forward(int cell, const ForwardArgs<float>& args, const Pool& pool);
void forward(int cell, const ForwardArgs<double>& args, const Pool& pool);
void forward(int cell, const ForwardArgs<BFloat16>& args, const Pool& pool);
void backward(int cell, const BackwardArgs<float>& args, const Pool& pool);
void backward(int cell, const BackwardArgs<double>& args, const Pool& pool);
void backward(int cell, const BackwardArgs<BFloat16>& args, const Pool& pool);
// Whether there are kernels of the cell for values that are stored in bfloat16, on tiles.
bool stores_bfloat16(int cell);
// False, and nothing done, if the cell has no such step.
bool update(int cell, bool backward, const UpdateArgs<float>& args, const Pool& pool);
bool update(int cell, bool backward, const UpdateArgs<double>& args, const Pool& pool);
void mask(const MaskArgs<float>& args, const Pool& pool);
void mask(const MaskArgs<double>& args, const Pool& pool);
void mask(const MaskArgs<uint8_t>& args, const Pool& pool);

// The instruction set in use ("base", "avx2", "avx512", "amx"), those this machine can use
// (separated by spaces), and a way for tests to choose; set_isa is false and changes nothing if it
// cannot be.
const char* isa();
const char* isas();
bool set_isa(const char* name);

}  // namespace cpu
}  // namespace frnn
