// SPDX-License-Identifier: Apache-2.0
// The facts of the cells.
#include <array>

#include "cells/cell.h"
#include "recurrence.h"

namespace frnn {
namespace {

template <CellPolicy... C>
constexpr auto facts_of(CellList<C...>) {
  return std::array{CellFacts{C::kName, C::kGates, C::kStates, C::kSaved, C::kParams, kLateGates<C>,
                              C::kAdditive, C::kReadsH, NormalisesState<C>}...};
}
constexpr auto kFacts = facts_of(Cells{});

}  // namespace

int plain_cell_count() { return PlainCells::kCount; }
int cell_count() { return static_cast<int>(kFacts.size()); }
const CellFacts& cell_facts(int cell) { return kFacts[cell]; }

}  // namespace frnn
