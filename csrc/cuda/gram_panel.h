// Panels of a view in shared memory, K columns × all rows from any strides, and the Gram products read from them.
#pragma once
#include "device.h"

namespace teleport_fast {

// Elements (k, row) of a panel lie row-fast, their quads of rows permuted by k so that neither the stores of columns-fast
// inputs nor the reads of a warp meet in a bank. stride: a multiple of 32.
template <int K>
__device__ __forceinline__ int at_quad(int stride, int k, int quad) {
  constexpr int kTurn = K == 16 ? 2 : 1;
  return k * stride + ((quad ^ (k / 4 * kTurn & 7)) * 4);
}

// Copies K columns of a head into shared memory, zeros where the view ends, by `workers` threads of which this is one.
// Neighbouring workers take neighbouring values: packs of four where they fit, single ones else. Returns the sum of the
// squares of the thread's share.
template <int K, class Acc>
__device__ __forceinline__ Acc fill_panel(const View& view, int head, int64_t index, Shared<Acc>* panel, int stride,
                                          int padded, int worker, int workers) {
  const int64_t left = static_cast<int64_t>(view.outer) * view.inner - index * K;
  const int count = static_cast<int>(left < K ? left : K), rows = view.rows;
  const bool rows_fast = view.rows_fast;
  Acc squares = 0;
  with_storage<Acc>(view.storage, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* data = static_cast<const S*>(view.data) + head * view.head_stride;
    if (view.vector && view.outer == 1) {
      constexpr int kPiece = sizeof(S) == 8 ? 2 : 4, kInFlight = sizeof(S) == 8 ? 2 : 3;
      const int fast = rows_fast ? padded / 4 : K / 4;
      const int64_t row_step = view.row_stride, column_step = view.inner_stride;
      data += index * K * column_step;
      TF_NO_UNROLL
      for (int begin = worker; begin < K * padded / 4; begin += workers * kInFlight) {
        Pack<S, kPiece> x[kInFlight][4 / kPiece];
        TF_UNROLL
        for (int i = 0; i < kInFlight; ++i) {
          const int quad = begin + i * workers;
          TF_UNROLL
          for (int j = 0; j < 4; j += kPiece) {
            const int row = rows_fast ? quad % fast * 4 + j : quad / fast;
            const int k = rows_fast ? quad / fast : quad % fast * 4 + j;
            x[i][j / kPiece] = {};
            if (row < rows && k < count) {
              x[i][j / kPiece] = gload(reinterpret_cast<const Pack<S, kPiece>*>(data + row * row_step + k * column_step));
            }
          }
        }
        TF_UNROLL
        for (int i = 0; i < kInFlight; ++i) {
          const int quad = begin + i * workers;
          if (quad >= K * padded / 4) break;
          Pack<Acc, 4> values;
          TF_UNROLL
          for (int j = 0; j < 4; ++j) {
            values.v[j] = widen(x[i][j / kPiece].v[j % kPiece]);
            squares += values.v[j] * values.v[j];
          }
          if (rows_fast) {
            sstore<4>(panel + at_quad<K>(stride, quad / fast, quad % fast), values);
          } else {
            const int row = quad / fast, k = quad % fast * 4;
            TF_UNROLL
            for (int j = 0; j < 4; ++j) panel[at_quad<K>(stride, k + j, row / 4) + row % 4] = values.v[j];
          }
        }
      }
    } else {
      const Columns columns(view, index * K);
      const int fast = rows_fast ? padded : K;
      TF_NO_UNROLL
      for (int element = worker; element < K * padded; element += workers) {
        const int row = rows_fast ? element % fast : element / fast, k = rows_fast ? element / fast : element % fast;
        Acc value = 0;
        if (row < rows && k < count) value = widen(gload(data + row * view.row_stride + columns.offset(k)));
        squares += value * value;
        panel[at_quad<K>(stride, k, row / 4) + row % 4] = value;
      }
    }
  });
  return squares;
}

// sums += the outer products of M rows ti and M rows tj over columns first, first + step, … of a panel.
// Rows of a micro tile are quads `side` quads apart, so that a warp's reads are neighbours.
template <int K, int M, class Acc>
__device__ __forceinline__ void add_products(const Shared<Acc>* panel, int stride, int side, int ti, int tj, int first,
                                             int step, Acc (&sums)[M][M]) {
  TF_NO_UNROLL
  for (int k = first; k < K; k += step) {
    Acc a[M];
    TF_UNROLL
    for (int u = 0; u < M / 4; ++u) {
      const Pack<Acc, 4> rows = sload<4>(panel + at_quad<K>(stride, k, ti + u * side));
      TF_UNROLL
      for (int j = 0; j < 4; ++j) a[u * 4 + j] = rows.v[j];
    }
    TF_UNROLL
    for (int u = 0; u < M / 4; ++u) {
      const Pack<Acc, 4> b = sload<4>(panel + at_quad<K>(stride, k, tj + u * side));
      TF_UNROLL
      for (int i = 0; i < M; ++i) {
        TF_UNROLL
        for (int j = 0; j < 4; ++j) sums[i][u * 4 + j] += a[i] * b.v[j];
      }
    }
  }
}

// The pair-th of the pairs ti ≥ tj ≥ 0.
__device__ __forceinline__ void pair_of(int pair, int& ti, int& tj) {
  ti = static_cast<int>((sqrtf(8.0f * pair + 1.0f) - 1.0f) / 2.0f);
  while ((ti + 1) * (ti + 2) / 2 <= pair) ++ti;
  while (ti * (ti + 1) / 2 > pair) --ti;
  tj = pair - ti * (ti + 1) / 2;
}

// Writes a 4 × 4 tile of an h × h matrix and, off the diagonal, its mirror image; a tile on the diagonal is made its own,
// since a compiler may round an entry and its mirror image differently (one contracted, one not).
template <class Acc>
__device__ __forceinline__ void write_tile(Acc* d, int h, int row, int column, Acc (&tile)[4][4], bool mirror) {
  TF_UNROLL
  for (int i = 0; i < 16; ++i) {
    if (!mirror && i / 4 < i % 4) tile[i / 4][i % 4] = tile[i % 4][i / 4];
  }
  if (h % 4 == 0) {
    constexpr int kPiece = sizeof(Acc) == 8 ? 2 : 4;
    using P = Pack<Acc, kPiece>;
    if (row >= h || column >= h) return;
    TF_UNROLL
    for (int i = 0; i < 4; ++i) {
      TF_UNROLL
      for (int j = 0; j < 4; j += kPiece) {
        P straight;
        TF_UNROLL
        for (int u = 0; u < kPiece; ++u) straight.v[u] = tile[i][j + u];
        gstore(reinterpret_cast<P*>(d + (row + i) * h + column + j), straight);
      }
    }
    if (!mirror) return;
    TF_UNROLL
    for (int i = 0; i < 4; ++i) {
      TF_UNROLL
      for (int j = 0; j < 4; j += kPiece) {
        P across;
        TF_UNROLL
        for (int u = 0; u < kPiece; ++u) across.v[u] = tile[j + u][i];
        gstore(reinterpret_cast<P*>(d + (column + i) * h + row + j), across);
      }
    }
  } else {
    TF_UNROLL
    for (int i = 0; i < 4; ++i) {
      TF_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (row + i >= h || column + j >= h) continue;
        gstore(d + (row + i) * h + column + j, tile[i][j]);
        if (mirror) gstore(d + (column + j) * h + row + i, tile[i][j]);
      }
    }
  }
}

}  // namespace teleport_fast
