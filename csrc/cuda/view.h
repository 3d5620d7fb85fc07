// The descriptor of a strided view (heads, rows, outer, inner) that every kernel takes, and how the host prepares one.
#pragma once
#include <cstdint>

namespace teleport_fast {

enum Storage : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Strides are in elements. The first block is the caller's; the planners fill in the second.
struct View {
  void* data;
  int64_t head_stride, row_stride, outer_stride, inner_stride;
  int32_t heads, rows, outer, inner;
  int32_t storage;  // a Storage
  int32_t joint;    // the joint, by position, that the view belongs to

  int32_t rows_fast;   // neighbouring rows, not columns, are neighbours in memory
  int32_t vector;      // packs of 16 bytes along the fast axis are aligned and whole
  int32_t splits;      // parts that the columns are cut into, one block each
  int32_t row_blocks;  // parts that the rows of one head are cut into
  int32_t slot;        // of the joint's partial sums, the first that belongs to this view
  int32_t first_tile;  // of the launch's blocks, the first that works on this view
};

inline int64_t storage_bytes(int32_t storage) {
  return storage == kFloat64 ? 8 : storage == kFloat32 ? 4 : 2;
}

// Joins axes that are one run of memory, finds the fast axis, and says whether 16-byte packs fit.
// join_heads: the op treats rows alike, so that heads × rows may be one axis. Returns false if a size is out of range.
inline bool prepare(View& view, bool join_heads) {
  if (view.heads < 0 || view.rows < 0 || view.outer < 0 || view.inner < 0) return false;
  if (view.storage < kFloat32 || view.storage > kFloat16) return false;
  if (view.inner == 1) {
    view.inner = view.outer, view.inner_stride = view.outer_stride;
    view.outer = 1;
  } else if (view.outer != 1 && view.outer_stride == view.inner * view.inner_stride &&
             int64_t{view.outer} * view.inner <= INT32_MAX) {
    view.inner *= view.outer;
    view.outer = 1;
  }
  if (join_heads && view.heads != 1 && view.head_stride == view.rows * view.row_stride &&
      int64_t{view.heads} * view.rows <= INT32_MAX) {
    view.rows *= view.heads;
    view.heads = 1;
  }
  int64_t column_step = view.inner > 1 ? view.inner_stride : view.outer > 1 ? view.outer_stride : INT64_MAX;
  view.rows_fast = view.rows > 1 && view.row_stride < column_step;
  int64_t pack = 16 / storage_bytes(view.storage);
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  aligned = aligned && (view.heads == 1 || view.head_stride % pack == 0);
  if (view.rows_fast) {
    aligned = aligned && view.row_stride == 1 && view.rows % pack == 0;
    aligned = aligned && (view.inner == 1 || view.inner_stride % pack == 0);
    aligned = aligned && (view.outer == 1 || view.outer_stride % pack == 0);
  } else {
    aligned = aligned && view.inner_stride == 1 && view.inner % pack == 0;
    aligned = aligned && (view.rows == 1 || view.row_stride % pack == 0);
    aligned = aligned && (view.outer == 1 || view.outer_stride % pack == 0);
  }
  view.vector = aligned;
  return true;
}

inline int64_t columns_of(const View& view) { return int64_t{view.outer} * view.inner; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace teleport_fast
