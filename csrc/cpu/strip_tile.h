// Rows of a matrix times one packed strip, stored as rows a step apart.
#pragma once

#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {

// to[m * row_step + v] = Σ_k rows[m * depth + k] * strip[k][v], a whole strip wide.
template <class S, class T>
struct StripTile {
  const T *rows, *strip;
  int64_t depth;
  S* to;
  int64_t row_step;

  template <int Rows>
  INLINE void run(int64_t first) const {
    Vec<T> sum[Rows][2];
    multiply_tile<T, Rows, 2>(rows + first * depth, depth, 1, strip, depth, sum);
    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < 2; ++v) store(sum[m][v], to + (first + m) * row_step + v * kLanes<T>);
  }
};

}  // namespace teleport_fast::TELEPORT_FAST_ISA
