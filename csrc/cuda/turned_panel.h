// Panels of a matrix in shared memory, 256 threads with 8 × 4 results each: products with a basis, and the way in and out.
#pragma once
#include <type_traits>

#include "gram_panel.h"

namespace teleport_fast {

constexpr int kThreads = 256;
constexpr int kRows = 8, kColumns = 4;  // results per thread

template <class Acc>
using Results = Acc[kRows][kColumns];

// The thread's place among its block's results: quads of rows `row_groups` quads apart, so that a warp's reads are neighbours.
struct Place {
  int row_group, column_group, row_groups;

  __device__ __forceinline__ int row(int i) const { return (row_group + i / 4 * row_groups) * 4 + i % 4; }
};

// results = Σ a(i, k) b(k, j) over k < depth, a multiple of 4. Both lie in quads (at_quad), a as (k, i) where kDown and else
// as (i, k), b as (k, j) where kAcross and else as (j, k).
template <bool kDown, bool kAcross, class Acc>
__device__ __forceinline__ void multiply(const Shared<Acc>* a, int a_stride, const Shared<Acc>* b, int b_stride, int depth,
                                         const Place& place, Results<Acc>& results) {
  constexpr int kStep = sizeof(Acc) == 8 ? 1 : 2;
  TF_UNROLL
  for (int i = 0; i < kRows * kColumns; ++i) results[i / kColumns][i % kColumns] = 0;
  TF_NO_UNROLL
  for (int k = 0; k < depth; k += kStep) {
    Acc left[kRows][kStep], right[kStep][kColumns];
    TF_UNROLL
    for (int i = 0; kDown && i < 2 * kStep; ++i) {
      const int quad = place.row_group + i % 2 * place.row_groups;
      const Pack<Acc, 4> x = sload<4>(a + at_quad<32>(a_stride, k + i / 2, quad));
      TF_UNROLL
      for (int j = 0; j < 4; ++j) left[i % 2 * 4 + j][i / 2] = x.v[j];
    }
    TF_UNROLL
    for (int i = 0; !kDown && i < kRows; ++i) {
      const Pack<Acc, kStep> x = sload<kStep>(a + at_quad<32>(a_stride, place.row(i), k / 4) + k % 4);
      TF_UNROLL
      for (int u = 0; u < kStep; ++u) left[i][u] = x.v[u];
    }
    TF_UNROLL
    for (int u = 0; kAcross && u < kStep; ++u) {
      const Pack<Acc, 4> x = sload<4>(b + at_quad<32>(b_stride, k + u, place.column_group));
      TF_UNROLL
      for (int j = 0; j < 4; ++j) right[u][j] = x.v[j];
    }
    TF_UNROLL
    for (int j = 0; !kAcross && j < kColumns; ++j) {
      const Pack<Acc, kStep> x = sload<kStep>(b + at_quad<32>(b_stride, place.column_group * 4 + j, k / 4) + k % 4);
      TF_UNROLL
      for (int u = 0; u < kStep; ++u) right[u][j] = x.v[u];
    }
    TF_UNROLL
    for (int u = 0; u < kStep; ++u) {
      TF_UNROLL
      for (int i = 0; i < kRows * kColumns; ++i) {
        results[i / kColumns][i % kColumns] += left[i / kColumns][u] * right[u][i % kColumns];
      }
    }
  }
}

// One product of the panel with a basis, in place; all threads of the block come along.
template <bool kDown, bool kAcross, class Acc>
__device__ __forceinline__ void turn_panel(const Shared<Acc>* a, int a_stride, const Shared<Acc>* b, int b_stride, int depth,
                                           Place place, int column_groups, Shared<Acc>* panel, int width) {
  const bool works = place.column_group < column_groups;
  Results<Acc> results;
  // Idle threads repeat another's product: behind a branch, all products' sums were kept apart and spilled.
  if (!works) place.column_group = 0;
  multiply<kDown, kAcross, Acc>(a, a_stride, b, b_stride, depth, place, results);
  __syncthreads();
  TF_UNROLL
  for (int i = 0; i < kRows && works; ++i) {
    sstore<4>(panel + at_quad<32>(width, place.row(i), place.column_group),
              Pack<Acc, 4>{results[i][0], results[i][1], results[i][2], results[i][3]});
  }
  __syncthreads();
}

// A basis of n rows, zeros behind them up to padded × stride.
template <class Acc>
__device__ __forceinline__ void load_basis(const Acc* from, int n, int padded, int stride, Shared<Acc>* to) {
  TF_UNROLL_BY(4)
  for (int i = threadIdx.x; i < padded * stride; i += kThreads) {
    const int row = i / stride, column = i % stride;
    to[at_quad<32>(stride, row, column / 4) + column % 4] = row < n && column < n ? gload(from + row * n + column) : Acc(0);
  }
}

// N neighbours of a tensor's fast axis, or one entry: aligned packs of up to 16 bytes.
template <int N, class Acc>
__device__ __forceinline__ void read(const View& view, int64_t offset, Acc (&x)[N]) {
  with_storage<Acc>(view.storage, [&](auto* type) {
    using P = Pack<std::remove_pointer_t<decltype(type)>, N>;
    const P pack = gload(reinterpret_cast<const P*>(static_cast<decltype(type)>(view.data) + offset));
    TF_UNROLL
    for (int j = 0; j < N; ++j) x[j] = widen(pack.v[j]);
  });
}
template <int N, class Acc>
__device__ __forceinline__ void write(const View& view, int64_t offset, const Acc (&x)[N]) {
  with_storage<Acc>(view.storage, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    Pack<S, N> pack;
    TF_UNROLL
    for (int j = 0; j < N; ++j) pack.v[j] = narrow<S>(x[j]);
    gstore(reinterpret_cast<Pack<S, N>*>(static_cast<S*>(view.data) + offset), pack);
  });
}

// One panel of one head: its rows and columns that are there, from first_row and first on.
struct Panel {
  int head, first, first_row, rows, count;
};

// A tensor's entries by their row and column in the panel.
struct Operand {
  View view;
  Columns columns;
  int64_t start;

  __device__ __forceinline__ Operand(const View& of, const Panel& panel)
      : view(of), columns(view, panel.first), start(int64_t{panel.head} * view.head_stride + int64_t{panel.first_row} * view.row_stride) {}
  __device__ __forceinline__ int64_t at(int row, int column) const {
    return start + row * view.row_stride + columns.offset(column);
  }
};

// Calls body(N, row, column) for the pieces of a panel that are the thread's: N entries along the fast axis, or one. Where
// rows are fast, a warp takes 32 bytes of rows × as many columns as it has lanes left: whole sectors.
template <class Acc, class Body>
__device__ __forceinline__ void for_pieces(const View& view, int rows, int columns, Body body) {
  constexpr int kPiece = sizeof(Acc) == 8 ? 2 : 4;
  const int bytes = view.storage == kFloat64 ? 8 : view.storage == kFloat32 ? 4 : 2;
  const int piece = view.vector ? kPiece : 1, across = 32 / (piece * bytes), down = 32 / across;
  const int pieces = ((view.rows_fast ? rows : columns) + piece - 1) / piece, blocks = (pieces + across - 1) / across;
  const int total = view.rows_fast ? blocks * ((columns + down - 1) / down) * 32 : pieces * rows;
  TF_NO_UNROLL
  for (int i = threadIdx.x; i < total; i += kThreads) {
    const int block = i / 32, lane = i % 32;
    const int row = view.rows_fast ? (block % blocks * across + lane % across) * piece : i / pieces;
    const int column = view.rows_fast ? block / blocks * down + lane / across : i % pieces * piece;
    if (row >= rows || column >= columns) continue;
    if (view.vector) {
      body(std::integral_constant<int, kPiece>{}, row, column);
    } else {
      body(std::integral_constant<int, 1>{}, row, column);
    }
  }
}

// The panel's entries of a piece.
template <int N, class Acc>
__device__ __forceinline__ void take(const Shared<Acc>* panel, int width, int row, int column, bool down, Acc (&x)[N]) {
  TF_UNROLL
  for (int j = 0; j < N; ++j) {
    const int r = down ? row + j : row, c = down ? column : column + j;
    x[j] = panel[at_quad<32>(width, r, c / 4) + c % 4];
  }
}
template <int N, class Acc>
__device__ __forceinline__ void put(Shared<Acc>* panel, int width, int row, int column, bool down, const Acc (&x)[N]) {
  TF_UNROLL
  for (int j = 0; j < N; ++j) {
    const int r = down ? row + j : row, c = down ? column : column + j;
    panel[at_quad<32>(width, r, c / 4) + c % 4] = x[j];
  }
}

// Σ x² of a panel's row, the same in all lanes.
template <class Acc>
__device__ __forceinline__ Acc row_squares(const Shared<Acc>* panel, int width, int row, int count) {
  Acc sum = 0;
  TF_NO_UNROLL
  for (int c = threadIdx.x % 32; c < count; c += 32) {
    const Acc x = panel[at_quad<32>(width, row, c / 4) + c % 4];
    sum += x * x;
  }
  return warp_sum(sum);
}

}  // namespace teleport_fast
