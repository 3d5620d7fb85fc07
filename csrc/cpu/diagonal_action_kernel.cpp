// diagonal_action_ for one instruction set: a block is multiplied where it lies, in the order of memory.
#include "diagonal_action.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

// (x + c) f - c as x f + c (f - 1): one rounding less, and small x are not lost in the sum.
template <class T, bool Shifted>
struct Change {
  T shift;

  INLINE Vec<T> operator()(Vec<T> x, Vec<T> factor) const {
    if constexpr (Shifted) return fma<T>(x, factor, (factor - T(1)) * shift);
    else return x * factor;
  }
  INLINE T operator()(T x, T factor) const {
    if constexpr (Shifted) return x * factor + (factor - T(1)) * shift;
    else return x * factor;
  }
};

template <class S, class T, bool Shifted>
INLINE void change_run(S* x, const Axis<1>& axis, const T* factors, Change<T, Shifted> change) {
  constexpr int lanes = kLanes<T>;
  const int64_t count = axis.size, step = axis.steps[0];
  const S* from = x;  // where load() knows the storage
  int64_t i = 0;
  if (step == 1 && axis.row_step == 0) {
    const Vec<T> factor = splat(*factors);
    for (; i + lanes <= count; i += lanes) store(change(load(from + i), factor), x + i);
  } else if (step == 1 && axis.row_step == 1) {
    for (; i + lanes <= count; i += lanes) store(change(load(from + i), load(factors + i)), x + i);
  }
  for (; i < count; ++i) narrow(change(widen(x[i * step]), factors[i * axis.row_step]), x + i * step);
}

// Fewer contiguous columns of a row, or fewer contiguous rows, are changed as if all entries were rows.
constexpr int64_t kShortRun = 32, kFoldedLanes = 1024;

// Rows of `width` contiguous columns, side by side: a 3 × 3 convolution read along its inputs.
template <class S, class T, bool Shifted>
void change_folded(S* x, const Axis<1>& columns, int64_t rows, int64_t width, const T* factors, Change<T, Shifted> change) {
  T spread[kFoldedLanes];
  for (int64_t first = 0, count; first < rows; first += count) {
    count = rows - first < kFoldedLanes / width ? rows - first : kFoldedLanes / width;
    for (int64_t i = 0; i < count * width; ++i) spread[i] = factors[first + i / width];
    for (int64_t c = 0; c < columns.size; ++c)
      change_run<S, T, Shifted>(x + first * width + c * columns.steps[0], Axis<1>{count * width, 1, {1}}, spread, change);
  }
}

// Columns of few rows, one after the other: many of them fill the lanes.
template <class S, class T, bool Shifted>
void change_narrow(S* x, int64_t columns, int64_t rows, const T* factors, Change<T, Shifted> change) {
  T spread[kFoldedLanes];
  const int64_t entries = columns * rows, lanes = kFoldedLanes / rows * rows;
  for (int64_t i = 0, row = 0; i < lanes && i < entries; ++i, row = row + 1 == rows ? 0 : row + 1) spread[i] = factors[row];
  for (int64_t i = 0; i < entries; i += lanes)
    change_run<S, T, Shifted>(x + i, Axis<1>{entries - i < lanes ? entries - i : lanes, 1, {1}}, spread, change);
}

template <class S, class T, bool Shifted>
void change_block(const DiagonalItem& item) {
  const Block<1>& block = item.block;
  const Axis<1>* axes = block.axes;
  const Change<T, Shifted> change{T(item.shift)};
  const bool folds = axes[3].row_step == 0 && axes[3].size < kShortRun && axes[3].steps[0] == 1 && axes[2].row_step == 1 &&
                     axes[2].steps[0] == axes[3].size && axes[1].row_step == 0;
  if (folds) {
    for (int64_t i = 0; i < axes[0].size; ++i)
      change_folded<S, T, Shifted>(
          static_cast<S*>(block.data[0]) + i * axes[0].steps[0], axes[1], axes[2].size, axes[3].size,
          static_cast<const T*>(item.factors) + block.row + i * axes[0].row_step, change);
    return;
  }
  if (axes[3].row_step == 1 && axes[3].size < kShortRun && axes[3].steps[0] == 1 && axes[2].row_step == 0 && axes[2].steps[0] == axes[3].size) {
    for (int64_t i = 0; i < axes[0].size; ++i)
      for (int64_t j = 0; j < axes[1].size; ++j)
        change_narrow<S, T, Shifted>(
            static_cast<S*>(block.data[0]) + i * axes[0].steps[0] + j * axes[1].steps[0], axes[2].size, axes[3].size,
            static_cast<const T*>(item.factors) + block.row + i * axes[0].row_step + j * axes[1].row_step, change);
    return;
  }
  for (int64_t i = 0; i < axes[0].size; ++i)
    for (int64_t j = 0; j < axes[1].size; ++j)
      for (int64_t k = 0; k < axes[2].size; ++k) {
        const int64_t row = block.row + i * axes[0].row_step + j * axes[1].row_step + k * axes[2].row_step;
        S* x = static_cast<S*>(block.data[0]) + i * axes[0].steps[0] + j * axes[1].steps[0] + k * axes[2].steps[0];
        change_run<S, T, Shifted>(x, axes[3], static_cast<const T*>(item.factors) + row, change);
      }
}

template <class S, class T>
void change(const DiagonalItem& item) {
  if (item.shift != 0) change_block<S, T, true>(item);
  else change_block<S, T, false>(item);
}

}  // namespace

void diagonal_item(const DiagonalItem& item) {
  switch (item.storage) {
    case Storage::Float64: return change<double, double>(item);
    case Storage::BFloat16: return change<BFloat16, float>(item);
    case Storage::Half: return change<Half, float>(item);
    default: return change<float, float>(item);
  }
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
