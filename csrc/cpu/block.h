// A block of strided tensors as four nested loops in the order of memory, for ops that stream over entries.
#pragma once

#include <cstdint>

namespace teleport_fast {

// One loop over `Operands` tensors of one shape. `row_step` is what a turn adds to the row's number, 0 along columns.
template <int Operands>
struct Axis {
  int64_t size, row_step;
  int64_t steps[Operands];  // in elements
};

// The fastest axis is the last one.
template <int Operands>
struct Block {
  void* data[Operands];
  int64_t row;
  Axis<Operands> axes[4];
};

}  // namespace teleport_fast
