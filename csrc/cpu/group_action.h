// group_action_: the work items that its host side hands to the kernel of one instruction set.
#pragma once

#include "isa.h"
#include "storage.h"

namespace teleport_fast {

// Columns that are loaded, multiplied and written back together: (h, 64) float32 is 32 KB at h = 128, inside a second-level cache.
constexpr int64_t kActionColumns = 64;

// One head's columns [first, first + count) become g times themselves. g: (h, h) contiguous.
struct ActionItem {
  const View* view;
  const void* g;
  int64_t head, first, count, h;
  void* scratch;
};

// Elements of scratch that an item of width h may use, for any instruction set: g's strips or the panel's, a strip's result, the
// panel's columns.
inline int64_t action_scratch(int64_t h) {
  const int64_t padded = (h + 31) / 32 * 32 + kActionColumns;
  return h * padded + 32 * padded + h * kActionColumns;
}

TELEPORT_FAST_KERNEL(action_item, (const ActionItem& item, bool is_double))

}  // namespace teleport_fast
