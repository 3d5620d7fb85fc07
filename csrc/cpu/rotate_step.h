// rotate_step_: the work items that its host side hands to the kernel of one instruction set.
#pragma once

#include "isa.h"
#include "storage.h"

namespace teleport_fast {

enum class BaseMap : int32_t { Adam, Sign, RowNorm };

// keep = 1 - lr * weight_decay; rate: lr, by Adam's first correction too; scale = 1 / sqrt(1 - beta2^step). U is the base map
// of old * m + fresh * g': the moment itself is 1, 0, and Nesterov's look ahead beta1, 1 - beta1.
struct RotateNumbers {
  double beta1, beta2, eps, keep, rate, scale, old, fresh;
};

// One head's matrix of a tensor. Columns are (outer, inner), of RotateItem's inner; `flat` where one step leads through them all.
struct RotateOperand {
  void* data;
  Storage storage;
  bool flat;
  int64_t row_step, outer_step, inner_step;
};

// The pieces of a thread's scratch memory, in elements, and the bases that are packed there.
struct RotateScratch {
  void *panels[2], *row_basis_t, *column_strips[2], *chunks[3], *norms, *sums;
  const void *packed_rows, *packed_columns;
};

// A panel of a (rows, columns) matrix, all rows of it where they are turned or normed together, and all columns likewise:
// G' = row_basis G column_basisᵀ; a null basis turns nothing.
struct RotateItem {
  RotateOperand parameter, gradient, first_moment, second_moment;
  int64_t rows, columns, inner;
  int64_t first_row, row_count, first_column, column_count;
  const void *row_basis, *column_basis;
  BaseMap base;
  bool norm_of_columns;  // the matrix is the view's transpose, so that a row of the view is a column here
  RotateNumbers numbers;
  RotateScratch* scratch;
};

// Rows that moments and parameters pass in at a time: with 16 float columns 4 KB each, inside a first-level cache.
constexpr int64_t kRotateChunk = 64;
// The widest strip of any instruction set and type, in columns, and the widest vector.
constexpr int64_t kRotateStrip = 32, kRotateLanes = 16;

inline int64_t rotate_padded(int64_t columns) { return (columns + kRotateStrip - 1) / kRotateStrip * kRotateStrip; }

TELEPORT_FAST_KERNEL(rotate_item, (const RotateItem& item, bool is_double))

}  // namespace teleport_fast
