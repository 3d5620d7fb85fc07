// matrix_exp and matrix_exp_pair: the matrices that their host side hands to the kernel of one instruction set.
#pragma once

#include "isa.h"
#include "storage.h"

namespace teleport_fast {

// plus = exp(matrices), minus = exp(-matrices) unless it is null; all (count, h, h) contiguous.
struct ExpItem {
  const void* matrices;
  void *plus, *minus;
  int64_t count, h;
  void* scratch;
};

// Bytes of scratch for any instruction set: nine matrices whose rows are padded to whole vectors and by one line more.
inline int64_t exp_scratch(int64_t h, int64_t element) { return 9 * h * (((h * element + 127) / 128 + 1) * 128) + 128; }

TELEPORT_FAST_KERNEL(exp_item, (const ExpItem& item, bool is_double))

}  // namespace teleport_fast
