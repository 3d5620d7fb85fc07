// grad_norm_objective: the group element that its host side hands to the kernel of one instruction set.
#pragma once

#include "isa.h"
#include "storage.h"

namespace teleport_fast {

// objective = tr(P⁻¹ S₊) + tr(P S₋), P = gᵀ g, from minus_gram_plus = −S₊ and gram_minus = S₋, either null where its list is empty.
struct ObjectiveItem {
  const void *g, *minus_gram_plus, *gram_minus;
  void* objective;
  int64_t h;
  void* scratch;
};

// Bytes of scratch for any instruction set: three matrices with padded rows, as in exp_scratch, and the order of the pivots.
inline int64_t objective_scratch(int64_t h, int64_t element) {
  return 3 * h * (((h * element + 127) / 128 + 1) * 128) + 8 * h + 128;
}

TELEPORT_FAST_KERNEL(objective_item, (const ObjectiveItem& item, bool is_double))

}  // namespace teleport_fast
