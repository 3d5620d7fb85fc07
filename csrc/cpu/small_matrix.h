// Products of small matrices that stay in a second-level cache: (h, ld), rows padded with zeros to whole vectors.
#pragma once

#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {

// Rows padded to whole vectors; from 512 bytes on by one more line, since a power of two puts a column into few cache sets.
template <class T>
int64_t row_length(int64_t h) {
  const int64_t padded = (h + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  return padded * int64_t(sizeof(T)) % 512 ? padded : padded + 64 / int64_t(sizeof(T));
}

// out = x y + factor add, rows of `Vectors` vectors; x, y, add, out: (h, ld).
template <class T, int Vectors>
struct ProductTile {
  const T *x, *y, *add;
  T* out;
  int64_t h, ld;
  const T* factor;  // in memory: a vector of it would cost the product's loop a register

  template <int Rows>
  INLINE void run(int64_t first) const {
    constexpr int lanes = kLanes<T>;
    Vec<T> sum[Rows][Vectors];
    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < Vectors; ++v) sum[m][v] = Vec<T>{};
    const T* row = x + first * ld;
    for (int64_t k = 0; k < h; ++k) {
      Vec<T> column[Vectors];
      for (int v = 0; v < Vectors; ++v) column[v] = load(y + k * ld + v * lanes);
      for (int m = 0; m < Rows; ++m) {
        const Vec<T> entry = splat(row[m * ld + k]);
        for (int v = 0; v < Vectors; ++v) sum[m][v] = fma<T>(entry, column[v], sum[m][v]);
      }
    }
    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = (first + m) * ld + v * lanes;
        store(add ? fma<T>(splat(*factor), load(add + at), sum[m][v]) : sum[m][v], out + at);
      }
  }
};

struct Shape {
  int64_t h, ld;
  // Whether factors and product are symmetric: then the product's lower triangle is computed and mirrored.
  bool symmetric;
};

// The upper triangle from the lower one, and zeros behind the h-th column.
template <class T>
NOINLINE void mirror(T* matrix, int64_t h, int64_t ld) {
  constexpr int block = kBlock<T>;
  for (int64_t i = 0; i < h; i += block) {
    const int64_t rows = h - i < block ? h - i : block;
    for (int64_t j = 0; j < i; j += block) {
      T *from = matrix + i * ld + j, *to = matrix + j * ld + i;
      if (rows == block) {
        transpose_block(from, ld, to, ld);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < block; ++c) to[c * ld + r] = from[r * ld + c];
    }
    T* corner = matrix + i * ld + i;
    for (int64_t r = 1; r < rows; ++r)
      for (int64_t c = 0; c < r; ++c) corner[c * ld + r] = corner[r * ld + c];
  }
  for (int64_t i = 0; i < h; ++i)
    for (int64_t j = h; j < ld; ++j) matrix[i * ld + j] = 0;
}

// out = x y + factor add, all (h, ld).
template <class T>
NOINLINE void multiply(const T* x, const T* y, const T* add, double factor, T* out, const Shape& shape) {
  const int64_t h = shape.h, ld = shape.ld;
  const T scale = T(factor);
  for (int64_t j = 0; j < h; j += kStrip<T>) {
    // Rows above the strip's diagonal block are its mirror image.
    const int64_t first = shape.symmetric ? j : 0, corner = first * ld + j;
    const T* added = add ? add + corner : nullptr;
    if (h - j > kLanes<T>) for_row_tiles(h - first, ProductTile<T, 2>{x + first * ld, y + j, added, out + corner, h, ld, &scale});
    else for_row_tiles(h - first, ProductTile<T, 1>{x + first * ld, y + j, added, out + corner, h, ld, &scale});
  }
  if (shape.symmetric) mirror(out, h, ld);
}

// Copies (h, h) into (h, ld), columns behind h zero.
template <class T>
INLINE void pad_rows(const T* from, T* to, int64_t h, int64_t ld) {
  for (int64_t i = 0; i < h; ++i) {
    std::memcpy(to + i * ld, from + i * h, size_t(h) * sizeof(T));
    for (int64_t j = h; j < ld; ++j) to[i * ld + j] = 0;
  }
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
