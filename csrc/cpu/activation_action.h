// activation_action and its tangent: the panel that their host side hands to the kernel of one instruction set.
#pragma once

#include "isa.h"
#include "storage.h"

namespace teleport_fast {

// Columns of a panel: 64 KB of scratch in float32 at h = 256, and enough of them that packing costs little.
constexpr int64_t kActivationColumns = 64;

// Columns first … first + count of one head of Z, which become the same columns of out.
struct ActivationItem {
  const View* Z;
  int64_t head, first, count, h;
  const void* matrix;  // (h, h) contiguous, of the accumulator's type
  const void* slope;   // (h,), of the accumulator's type
  void* out;           // (h, out_step), of Z's type
  int64_t out_step;
  bool tangent;  // divide by σ'(Z) where the action divides by σ'(σ⁻¹(result))
  void* scratch;
};

// Bytes of scratch for any instruction set: the packed panel and the results of one strip.
inline int64_t activation_scratch(int64_t h, int64_t element) {
  return h * (kActivationColumns + 32) * element + h * 256 + 256;
}

TELEPORT_FAST_KERNEL(activation_item, (const ActivationItem& item, bool is_double))

}  // namespace teleport_fast
