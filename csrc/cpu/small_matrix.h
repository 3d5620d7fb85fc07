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

template <class T>
NOINLINE void multiply(const T* x, const T* y, const T* add, double factor, T* out, int64_t h, int64_t ld) {
  const T scale = T(factor);
  int64_t j = 0;
  for (; h - j > kLanes<T>; j += kStrip<T>)
    for_row_tiles(h, ProductTile<T, 2>{x, y + j, add ? add + j : nullptr, out + j, h, ld, &scale});
  if (j < h) for_row_tiles(h, ProductTile<T, 1>{x, y + j, add ? add + j : nullptr, out + j, h, ld, &scale});
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
