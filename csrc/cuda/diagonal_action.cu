// Diagonals and permutations act in place on any number of strided views, one launch for a whole model.
//
// Diagonal: x → (x + c) · s^e − c by rows. Moves each entry once in and once out, and s once per tile.
// Launch: one block of 256 threads per tile, 8 rows × 2,048 columns where columns are neighbours in memory, else 32
// lanes × one pack of rows × 512 columns. Permutation: a tile is all h rows × a few columns, held in shared memory between the
// read and the write, so that nothing is copied in global memory; int64 indices add 8 bytes per row and tile, at most
// 1.6% of the tile up to h = 128 (tiles of 512 bytes a row read and written), 12.5% from h = 2,048 on (64 bytes).
// Loses to plain torch for one small contiguous tensor (one multiplication, one launch either way).
#include "diagonal_action.h"

#include "device.h"

namespace teleport_fast {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumnsFastChunk = 2048;
constexpr int kRowsFastChunk = 512;
constexpr int kInFlight = 4;  // loads that a thread has under way before it uses the first
// A permutation's tile: two blocks fit an SM of 164 KiB, and a row of the tile is at least one sector where h allows it.
constexpr int64_t kPanelBytes = 64 << 10;
constexpr int64_t kPanelRowBytes = 512;

template <class Acc>
struct RowChange {
  Acc factor, shift;
  __device__ __forceinline__ Acc operator()(Acc x) const { return (x + shift) * factor - shift; }
};

template <class Acc>
__device__ __forceinline__ RowChange<Acc> row_change(const DiagonalView& d, int64_t row, int scale64) {
  const Acc s = scale64 ? static_cast<Acc>(gload(static_cast<const double*>(d.scale) + row))
                        : static_cast<Acc>(gload(static_cast<const float*>(d.scale) + row));
  Acc factor;
  if (d.exponent == 1) {
    factor = s;
  } else if (d.exponent == -1) {
    factor = 1 / s;
  } else if (d.exponent == 2) {
    factor = s * s;
  } else if (d.exponent == -2) {
    factor = 1 / (s * s);
  } else {
    factor = pow(s, static_cast<Acc>(d.exponent));
  }
  return {factor, static_cast<Acc>(d.shift)};
}

template <class Acc, class S>
__device__ __forceinline__ void scale_row(const View& view, S* row, int64_t first, int count, RowChange<Acc> change) {
  constexpr int kPack = 16 / sizeof(S);
  using P = Pack<S, kPack>;
  const int lane = threadIdx.x % 32;
  const Columns columns(view, first);
  if (!view.vector) {
    for (int k = lane; k < count; k += 32) {
      S* at = row + columns.offset(k);
      gstore(at, narrow<S>(change(widen(gload(at)))));
    }
    return;
  }
  for (int k = lane * kPack; k < count; k += 32 * kPack * kInFlight) {
    P x[kInFlight];
    TF_UNROLL
    for (int u = 0; u < kInFlight; ++u) {
      const int at = k + u * 32 * kPack;
      if (at < count) x[u] = gload(reinterpret_cast<const P*>(row + columns.offset(at)));
    }
    TF_UNROLL
    for (int u = 0; u < kInFlight; ++u) {
      const int at = k + u * 32 * kPack;
      if (at >= count) break;
      TF_UNROLL
      for (int j = 0; j < kPack; ++j) x[u].v[j] = narrow<S>(change(widen(x[u].v[j])));
      gstore(reinterpret_cast<P*>(row + columns.offset(at)), x[u]);
    }
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    diagonal_action_kernel(const DiagonalView* views, const int32_t* owners, int scale64) {
  SHARED_ARRAY(Shared<Acc>, factors, [32 * (sizeof(Acc) == 8 ? 2 : 8)]);
  const DiagonalView d = gload(views + gload(owners + blockIdx.x));
  const View& view = d.view;
  int tile = static_cast<int>(blockIdx.x) - view.first_tile;
  const int split = tile % view.splits;
  tile /= view.splits;
  const int row_block = tile % view.row_blocks, head = tile / view.row_blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunk = view.rows_fast ? kRowsFastChunk : kColumnsFastChunk;
  const int64_t first = static_cast<int64_t>(split) * chunk;
  const int64_t left = static_cast<int64_t>(view.outer) * view.inner - first;
  const int count = static_cast<int>(left < chunk ? left : chunk);
  const int64_t head_row = static_cast<int64_t>(head) * view.rows;

  with_storage<Acc>(view.storage, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = 16 / sizeof(S);
    using P = Pack<S, kPack>;
    S* data = static_cast<S*>(view.data) + head * view.head_stride;
    if (!view.rows_fast) {
      const int row = row_block * kWarps + warp;
      if (row < view.rows) {
        scale_row(view, data + row * view.row_stride, first, count, row_change<Acc>(d, head_row + row, scale64));
      }
      return;
    }
    // One thread computes a row's factor for all warps; s is read in its own order, once per tile.
    const int first_row = row_block * 32 * kPack;
    for (int r = threadIdx.x; r < 32 * kPack && first_row + r < view.rows; r += kThreads) {
      factors[r] = row_change<Acc>(d, head_row + first_row + r, scale64).factor;
    }
    __syncthreads();
    // Neighbouring lanes take neighbouring packs where a pack fits, else neighbouring rows.
    const int at_lane = view.vector ? lane * kPack : lane, row = first_row + at_lane, step = view.vector ? 1 : 32;
    RowChange<Acc> change[kPack] = {};
    TF_UNROLL
    for (int j = 0; j < kPack; ++j) {
      if (row + step * j < view.rows) change[j] = {factors[at_lane + step * j], static_cast<Acc>(d.shift)};
    }
    const Columns columns(view, first);
    for (int k = warp; k < count; k += kWarps) {
      S* column = data + columns.offset(k) + row * view.row_stride;
      if (view.vector) {
        if (row >= view.rows) continue;
        P x = gload(reinterpret_cast<const P*>(column));
        TF_UNROLL
        for (int j = 0; j < kPack; ++j) x.v[j] = narrow<S>(change[j](widen(x.v[j])));
        gstore(reinterpret_cast<P*>(column), x);
      } else {
        TF_UNROLL
        for (int j = 0; j < kPack; ++j) {
          if (row + 32 * j >= view.rows) break;
          S* at = column + 32 * j * view.row_stride;
          gstore(at, narrow<S>(change[j](widen(gload(at)))));
        }
      }
    }
  });
}

// Of shared memory, what the permutation's own copy takes in front of the panel.
__host__ __device__ inline int64_t index_bytes(int64_t rows) { return (rows * 4 + 15) / 16 * 16; }

// Moves bits, so one type per size serves all storages.
template <class Bits>
__device__ void permute_panel(const PermutedView& p, unsigned char* memory, int head, int split) {
  const View& view = p.view;
  Shared<int32_t>* from = reinterpret_cast<Shared<int32_t>*>(memory);
  Shared<Bits>* panel = reinterpret_cast<Shared<Bits>*>(memory + index_bytes(view.rows));
  const int64_t first = static_cast<int64_t>(split) * view.slot;
  const int64_t left = static_cast<int64_t>(view.outer) * view.inner - first;
  const int count = static_cast<int>(left < view.slot ? left : view.slot);
  Bits* data = static_cast<Bits*>(view.data) + head * view.head_stride;
  const int64_t* index = p.index + static_cast<int64_t>(head) * view.rows;
  const Columns columns(view, first);
  const uint32_t entries = static_cast<uint32_t>(view.rows) * count;
  const uint32_t fast = view.rows_fast ? view.rows : count;
  for (int r = threadIdx.x; r < view.rows; r += kThreads) from[r] = static_cast<int32_t>(gload(index + r));
  for (uint32_t i = threadIdx.x; i < entries; i += kThreads) {
    const uint32_t slow = i / fast, quick = i % fast;
    const uint32_t row = view.rows_fast ? quick : slow, column = view.rows_fast ? slow : quick;
    panel[i] = gload(data + row * view.row_stride + columns.offset(column));
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < entries; i += kThreads) {
    const uint32_t slow = i / fast, quick = i % fast;
    const uint32_t row = view.rows_fast ? quick : slow, column = view.rows_fast ? slow : quick;
    const uint32_t source = from[row];
    const Bits bits = panel[view.rows_fast ? column * fast + source : source * fast + column];
    gstore(data + row * view.row_stride + columns.offset(column), bits);
  }
}

__global__ void __launch_bounds__(kThreads) permutation_action_kernel(const PermutedView* views, const int32_t* owners) {
  DYNAMIC_SHARED(memory);
  const PermutedView p = gload(views + gload(owners + blockIdx.x));
  const int tile = static_cast<int>(blockIdx.x) - p.view.first_tile;
  const int split = tile % p.view.splits, head = tile / p.view.splits;
  if (p.view.storage == kFloat64) {
    permute_panel<uint64_t>(p, memory, head, split);
  } else if (p.view.storage == kFloat32) {
    permute_panel<uint32_t>(p, memory, head, split);
  } else {
    permute_panel<uint16_t>(p, memory, head, split);
  }
}

}  // namespace teleport_fast

using namespace teleport_fast;

int64_t tf_cuda_diagonal_action_plan(DiagonalView* views, int64_t count, int32_t* owners) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    View& view = views[i].view;
    if ((view.storage == kFloat64) != (views[0].view.storage == kFloat64) || !prepare(view, true)) return -1;
    const int64_t row_tile = view.rows_fast ? 32 * (16 / storage_bytes(view.storage)) : kWarps;
    const int64_t splits = ceil_div(columns_of(view), view.rows_fast ? kRowsFastChunk : kColumnsFastChunk);
    if (splits > INT32_MAX) return -1;
    view.splits = static_cast<int32_t>(splits);
    view.row_blocks = static_cast<int32_t>(ceil_div(view.rows, row_tile));
    view.first_tile = static_cast<int32_t>(tiles);
    const int64_t here = int64_t{view.heads} * view.row_blocks * splits;
    if (tiles + here > INT32_MAX) return -1;
    for (int64_t t = 0; owners && t < here; ++t) owners[tiles + t] = static_cast<int32_t>(i);
    tiles += here;
  }
  return tiles;
}

int64_t tf_cuda_permutation_action_plan(PermutedView* views, int64_t count, int64_t shared_limit, int32_t* owners,
                                        int64_t* shared_bytes) {
  int64_t tiles = 0;
  *shared_bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    View& view = views[i].view;
    if (!prepare(view, false)) return -1;
    view.first_tile = static_cast<int32_t>(tiles);
    const int64_t column_bytes = view.rows * storage_bytes(view.storage), columns = columns_of(view);
    if (column_bytes == 0 || columns == 0) {
      view.splits = 0;
      continue;
    }
    const int64_t limit = shared_limit - index_bytes(view.rows);
    if (column_bytes > limit) return -1;
    // `slot` holds the width of a tile: a power of two, so that tiles begin on sectors.
    int64_t width = 1;
    const int64_t sector = 32 / storage_bytes(view.storage), widest = kPanelRowBytes / storage_bytes(view.storage);
    while (width < widest && 2 * width * column_bytes <= kPanelBytes) width *= 2;
    while (width < sector && 2 * width * column_bytes <= limit) width *= 2;
    view.slot = static_cast<int32_t>(width);
    const int64_t splits = ceil_div(columns, width);
    if (splits > INT32_MAX || tiles + view.heads * splits > INT32_MAX) return -1;
    view.splits = static_cast<int32_t>(splits);
    const int64_t bytes = index_bytes(view.rows) + width * column_bytes;
    *shared_bytes = *shared_bytes > bytes ? *shared_bytes : bytes;
    for (int64_t t = 0; owners && t < view.heads * splits; ++t) owners[tiles + t] = static_cast<int32_t>(i);
    tiles += view.heads * splits;
  }
  return tiles;
}

cudaError_t tf_cuda_diagonal_action_(const DiagonalView* views, const int32_t* owners, int64_t tiles, int scale64,
                                     int float64, cudaStream_t stream) {
  if (tiles == 0) return cudaSuccess;
  const unsigned grid = static_cast<unsigned>(tiles);
  if (float64) return TF_LAUNCH(diagonal_action_kernel<double>, grid, kThreads, 0, stream, views, owners, scale64);
  return TF_LAUNCH(diagonal_action_kernel<float>, grid, kThreads, 0, stream, views, owners, scale64);
}

cudaError_t tf_cuda_permutation_action_(const PermutedView* views, const int32_t* owners, int64_t tiles,
                                        int64_t shared_bytes, cudaStream_t stream) {
  if (tiles == 0) return cudaSuccess;
  return TF_LAUNCH(permutation_action_kernel, static_cast<unsigned>(tiles), kThreads, static_cast<size_t>(shared_bytes),
                   stream, views, owners);
}
