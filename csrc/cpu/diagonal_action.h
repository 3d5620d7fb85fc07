// diagonal_action_: the work items that its host side hands to the kernel of one instruction set.
#pragma once

#include "block.h"
#include "isa.h"
#include "storage.h"

namespace teleport_fast {

// x becomes (x + shift) * factor - shift. factors: one per row, float or double (float64 storage), row 0 first.
struct DiagonalItem {
  Block<1> block;
  Storage storage;
  const void* factors;
  double shift;
};

TELEPORT_FAST_KERNEL(diagonal_item, (const DiagonalItem& item))

}  // namespace teleport_fast
