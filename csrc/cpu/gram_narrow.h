// Grams of one vector of rows, contiguous in memory: outer products of the columns where they lie, nothing is packed.
#pragma once

#include "gram_runs.h"

namespace teleport_fast::TELEPORT_FAST_ISA {

// Columns a step apart from which on the sums' way to memory and back costs less than packing.
constexpr int64_t kNarrowRun = 16;

template <class T>
INLINE bool gram_narrow(const View& view, int64_t h) {
  return h <= kLanes<T> && view.row_step == 1 && view.inner >= kNarrowRun && view.storage == (sizeof(T) == 8 ? Storage::Float64 : Storage::Float32);
}

// out[m] += sign * Σ_k from[k][m] * from[k], squares += Σ_k from[k]²; what lies `ahead` comes next, and is asked for.
template <class T>
struct OuterProducts {
  const T* from;
  int64_t step, depth, ahead;
  T sign, *out;
  int64_t out_step;
  T* squares;

  template <int Rows>
  INLINE void run(int64_t) const {
    // Eight sums in flight hide the latency.
    constexpr int chains = Rows > 4 ? 1 : Rows > 2 ? 2 : 4;
    Vec<T> sum[chains][Rows], square[2] = {};
    for (int c = 0; c < chains; ++c)
      for (int m = 0; m < Rows; ++m) sum[c][m] = Vec<T>{};
    auto add = [&](const T* column, Vec<T>(&to)[Rows], Vec<T>& to_square) {
      __builtin_prefetch(column + ahead);
      const Vec<T> x = Rows == kLanes<T> ? load(column) : load_part(column, Rows);
      to_square = fma<T>(x, x, to_square);
      for (int m = 0; m < Rows; ++m) to[m] = fma<T>(splat(column[m]), x, to[m]);
    };
    const T* column = from;
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4)
      for (int c = 0; c < 4; ++c, column += step) add(column, sum[c % chains], square[c % 2]);
    for (; k < depth; ++k, column += step) add(column, sum[0], square[0]);
    for (int m = 0; m < Rows; ++m) {
      for (int c = 1; c < chains; ++c) sum[0][m] += sum[c][m];
      store(fma<T>(splat(sign), sum[0][m], load(out + m * out_step)), out + m * out_step);
    }
    store(load(squares) + (square[0] + square[1]), squares);
  }
};

// partial += sign * (one head's columns of a segment) * (the same)ᵀ, the upper half too.
template <class T>
NOINLINE void add_narrow(const GramSegment& segment, int64_t head, int64_t ahead, int64_t h, T sign, T* partial, int64_t ld) {
  const View& view = *segment.view;
  for_runs(segment, head, [&](int64_t offset, int64_t, int64_t run) {
    const T* from = static_cast<const T*>(view.data) + offset;
    run_tile<kLanes<T>>(int(h), 0, OuterProducts<T>{from, view.inner_step, run, ahead, sign, partial, ld, partial + h * ld});
  });
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
