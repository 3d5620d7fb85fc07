// The panels of rotate_step_: packed into strips and back from any strides and storage, and multiplied by the bases.
#pragma once

#include "rotate_step.h"
#include "square_root.h"
#include "strip_tile.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {

// Elements between the operand's corner and column c of its matrix.
INLINE int64_t column_offset(const RotateItem& item, const RotateOperand& x, int64_t c) {
  return x.flat ? c * x.inner_step : c / item.inner * x.outer_step + c % item.inner * x.inner_step;
}

// Whether one step leads through `count` columns from c on.
INLINE bool one_run(const RotateItem& item, const RotateOperand& x, int64_t c, int64_t count) {
  return x.flat || c % item.inner + count <= item.inner;
}

// Calls f(typed pointer) with the operand's address in its storage type; T is the accumulator.
template <class T, class F>
INLINE void with_storage(const RotateOperand& x, const F& f) {
  if constexpr (sizeof(T) == 8) return f(static_cast<double*>(x.data));
  else {
    switch (x.storage) {
      case Storage::BFloat16: return f(static_cast<BFloat16*>(x.data));
      case Storage::Half: return f(static_cast<Half*>(x.data));
      default: return f(static_cast<float*>(x.data));
    }
  }
}

// Rows [row, row + rows) and columns [column, column + columns) of the panel as strips [strip][row][kStrip]; what is missing is 0.
template <class T>
NOINLINE void load_strips(const RotateItem& item, const RotateOperand& x, int64_t row, int64_t column, int64_t rows, int64_t columns, T* to) {
  const int64_t pitch = rows * kStrip<T>;
  with_storage<T>(x, [&](auto* data) {
    const auto* base = data + (item.first_row + row) * x.row_step;
    const int64_t first = item.first_column + column;
    if (one_run(item, x, first, columns))
      return pack_strips(base + column_offset(item, x, first), x.inner_step, x.row_step, columns, rows, to, pitch, 0);
    for (int64_t c = 0; c < columns; c += kStrip<T>, to += pitch) {
      const int64_t count = columns - c < kStrip<T> ? columns - c : kStrip<T>;
      if (one_run(item, x, first + c, count)) {
        pack_strips(base + column_offset(item, x, first + c), x.inner_step, x.row_step, count, rows, to, pitch, 0);
        continue;
      }
      for (int64_t a = 0; a < kStrip<T>; ++a) {
        const auto* from = base + (a < count ? column_offset(item, x, first + c + a) : 0);
        for (int64_t b = 0; b < rows; ++b) to[b * kStrip<T> + a] = a < count ? widen(from[b * x.row_step]) : T(0);
      }
    }
  });
}

// The way back of one strip, of `count` columns.
template <class T>
NOINLINE void store_strip(const RotateItem& item, const RotateOperand& x, int64_t row, int64_t column, int64_t rows, int64_t count, const T* from) {
  with_storage<T>(x, [&](auto* data) {
    auto* base = data + (item.first_row + row) * x.row_step;
    const int64_t first = item.first_column + column;
    if (x.inner_step == 1 && count == kStrip<T> && one_run(item, x, first, count)) {
      base += column_offset(item, x, first);
      for (int64_t b = 0; b < rows; ++b)
        for (int a = 0; a < kStrip<T>; a += kLanes<T>) store(load(from + b * kStrip<T> + a), base + b * x.row_step + a);
      return;
    }
    for (int64_t a = 0; a < count; ++a) {
      auto* to = base + column_offset(item, x, first + a);
      for (int64_t b = 0; b < rows; ++b) narrow(from[b * kStrip<T> + a], to + b * x.row_step);
    }
  });
}

// A piece of one strip of a moment or a parameter: where it lies, if whole vectors lie there, else in `spare`.
template <class T>
struct Chunk {
  T* data;
  int64_t pitch;
  int64_t count;
  bool direct;

  INLINE Chunk(const RotateItem& item, const RotateOperand& x, int64_t strip, int64_t row, int64_t rows, void* spare) {
    const int64_t column = strip * kStrip<T>, first = item.first_column + column;
    count = item.column_count - column < kStrip<T> ? item.column_count - column : kStrip<T>;
    direct = x.storage == (sizeof(T) == 8 ? Storage::Float64 : Storage::Float32) && x.inner_step == 1 && count == kStrip<T> &&
             one_run(item, x, first, count);
    if (direct) {
      data = static_cast<T*>(x.data) + (item.first_row + row) * x.row_step + column_offset(item, x, first);
      pitch = x.row_step;
    } else {
      data = static_cast<T*>(spare);
      pitch = kStrip<T>;
      load_strips<T>(item, x, row, column, rows, count, data);
    }
  }
  INLINE Vec<T> at(int64_t i, int lane) const { return load(static_cast<const T*>(data) + i * pitch + lane); }
  INLINE void put(Vec<T> value, int64_t i, int lane) const { store(value, data + i * pitch + lane); }
  INLINE void write(const RotateItem& item, const RotateOperand& x, int64_t strip, int64_t row, int64_t rows) const {
    if (!direct) store_strip<T>(item, x, row, strip * kStrip<T>, rows, count, data);
  }
};

// Asks for a panel that is needed after the next product: rows lie far apart, and are no stream to the hardware.
INLINE void ask_for(const RotateItem& item, const RotateOperand& x) {
  if (x.inner_step != 1 || !x.flat) return;
  const int64_t element = x.storage == Storage::Float64 ? 8 : x.storage == Storage::Float32 ? 4 : 2;
  const char* at = static_cast<const char*>(x.data) + (item.first_row * x.row_step + item.first_column) * element;
  for (int64_t i = 0; i < item.row_count; ++i, at += x.row_step * element)
    for (int64_t b = 0; b < item.column_count * element; b += 64) __builtin_prefetch(at + b);
}

template <class T>
void pack_bases(const RotateItem& item) {
  RotateScratch& scratch = *item.scratch;
  if (item.row_basis && item.row_basis != scratch.packed_rows) {
    const T* Q = static_cast<const T*>(item.row_basis);
    T* to = static_cast<T*>(scratch.row_basis_t);
    const int64_t n = item.rows, whole = n / kBlock<T> * kBlock<T>;
    for (int64_t i = 0; i < whole; i += kBlock<T>)
      for (int64_t j = 0; j < whole; j += kBlock<T>) transpose_block(Q + i * n + j, n, to + j * n + i, n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i < whole ? whole : 0; j < n; ++j) to[j * n + i] = Q[i * n + j];
    scratch.packed_rows = item.row_basis;
  }
  if (item.column_basis && item.column_basis != scratch.packed_columns) {
    const T* Q = static_cast<const T*>(item.column_basis);
    const int64_t n = item.columns;
    // X Qᵀ by strips of Qᵀ, X Q by strips of Q.
    pack_strips(Q, n, 1, n, n, static_cast<T*>(scratch.column_strips[0]), n * kStrip<T>, 0);
    pack_strips(Q, 1, n, n, n, static_cast<T*>(scratch.column_strips[1]), n * kStrip<T>, 0);
    scratch.packed_columns = item.column_basis;
  }
}

// to = matrix x, strip by strip; matrix: (rows, rows).
template <class T>
NOINLINE void turn_rows(const RotateItem& item, const T* matrix, const T* x, T* to) {
  const int64_t rows = item.rows, pitch = rows * kStrip<T>;
  for (int64_t c = 0; c < item.column_count; c += kStrip<T>, x += pitch, to += pitch)
    for_row_tiles(rows, StripTile<T, T>{matrix, x, rows, to, kStrip<T>});
}

template <class T>
struct ColumnTile {
  const T *x, *strip;
  T* to;
  int64_t pitch, depth;

  template <int Rows>
  INLINE void run(int64_t first) const {
    Vec<T> sum[Rows][2];
    for (int m = 0; m < Rows; ++m) sum[m][0] = sum[m][1] = Vec<T>{};
    const T *rows = x + first * kStrip<T>, *from = strip;
    for (int64_t done = 0; done < depth; done += kStrip<T>, rows += pitch) {
      const int count = int(depth - done < kStrip<T> ? depth - done : kStrip<T>);
      for (int k = 0; k < count; ++k, from += kStrip<T>) {
        const Vec<T> low = load(from), high = load(from + kLanes<T>);
        for (int m = 0; m < Rows; ++m) {
          const Vec<T> y = splat(rows[m * kStrip<T> + k]);
          sum[m][0] = fma<T>(y, low, sum[m][0]);
          sum[m][1] = fma<T>(y, high, sum[m][1]);
        }
      }
    }
    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < 2; ++v) store(sum[m][v], to + (first + m) * kStrip<T> + v * kLanes<T>);
  }
};

// to = x M for the M whose strips are given, (columns, columns).
template <class T>
NOINLINE void turn_columns(const RotateItem& item, const T* strips, const T* x, T* to) {
  const int64_t columns = item.columns, pitch = item.row_count * kStrip<T>;
  for (int64_t c = 0; c < columns; c += kStrip<T>, strips += columns * kStrip<T>, to += pitch)
    for_row_tiles(item.row_count, ColumnTile<T>{x, strips, to, pitch, columns});
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
