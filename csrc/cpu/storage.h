// The element types that kernels read and write, and a strided view of a joint's tensor as the kernels see it.
#pragma once

#include <cstdint>

namespace teleport_fast {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Storage : int32_t { Float32, BFloat16, Half, Float64 };

// (heads, h, outer, inner) with any strides, counted in elements. Columns are (outer, inner).
struct View {
  void* data;
  Storage storage;
  int64_t outer, inner;
  int64_t head_step, row_step, outer_step, inner_step;

  int64_t columns() const { return outer * inner; }
};

}  // namespace teleport_fast
