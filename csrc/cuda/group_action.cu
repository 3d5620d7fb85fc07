// A → g A in place on strided head views: parameters, gradients and momenta of a whole bucket in one launch, no copy.
//
// Moves each entry once in and once out; g is read once per block where it fits beside the panel (66 KiB, h ≤ 128), and
// once per panel else, from L2: 4 h² bytes for a panel of 32 KiB each way.
// Launch: 256 threads take (view, head, a run of panels). A panel is all h rows × W columns in shared memory, W such that
// a thread holds 8 × 4 results; results go back through the panel, so that loads and stores are neighbours in memory
// whichever axis is fast.
// Loses to the BLAS on one large contiguous A with h ≥ 256 in bf16, where tensor cores would pay.
#include "group_action.h"

#include "device.h"

namespace teleport_fast {

constexpr int kThreads = 256;
constexpr int kRows = 8, kColumns = 4;  // results per thread
constexpr int64_t kResidentBytes = 66 << 10, kSliceBytes = 32 << 10;

// Element (row, column) of a panel; quads of columns are permuted by row so that stores along rows spread over the banks.
__device__ __forceinline__ int at_panel(const GroupActionPlan& plan, int row, int column) {
  return row * plan.width + ((column / 4) ^ (row & plan.swizzle)) * 4 + column % 4;
}

// Global memory → panel, or back; zeros beyond `count` columns. The same thread moves the same entries both ways.
template <bool kLoad, class S, class Acc>
__device__ __forceinline__ void move_panel(const View& view, S* data, int64_t first, int count,
                                           const GroupActionPlan& plan, Shared<Acc>* panel) {
  const int rows = view.rows, width = plan.width;
  const bool rows_fast = view.rows_fast;
  if (view.vector && view.outer == 1) {
    // Where rows are fast, a warp takes 32 bytes of rows × as many columns as it has lanes left: whole sectors, no conflicts.
    constexpr int kPiece = sizeof(S) == 8 ? 2 : 4, kSteps = 4 / kPiece;
    constexpr int kAcross = sizeof(S) == 2 ? 4 : sizeof(S) == 4 ? 2 : 1, kDown = 32 / kAcross;
    const int quads = rows_fast ? (rows / 4 + (rows % 4 != 0) + kAcross - 1) / kAcross : width / 4;
    const int total = rows_fast ? quads * ((width + kDown - 1) / kDown) * 32 : quads * rows;
    data += first * view.inner_stride;
    TF_UNROLL_BY(4)
    for (int i = threadIdx.x; i < total; i += kThreads) {
      const int block = i / 32, lane = i % 32;
      const int row = rows_fast ? (block % quads * kAcross + lane % kAcross) * 4 : i / quads;
      const int column = rows_fast ? block / quads * kDown + lane / kAcross : i % quads * 4;
      if (column >= width) continue;
      TF_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const int r = rows_fast ? row + step * kPiece : row, c = rows_fast ? column : column + step * kPiece;
        if (r >= rows) continue;
        const bool inside = c < count;
        auto* at = reinterpret_cast<Pack<S, kPiece>*>(data + r * view.row_stride + c * view.inner_stride);
        Pack<S, kPiece> x = {};
        if (kLoad && inside) x = gload(at);
        TF_UNROLL
        for (int j = 0; j < kPiece; ++j) {
          const int place = rows_fast ? at_panel(plan, r + j, c) : at_panel(plan, r, c + j);
          if (kLoad) {
            panel[place] = widen(x.v[j]);
          } else {
            x.v[j] = narrow<S>(panel[place]);
          }
        }
        if (!kLoad && inside) gstore(at, x);
      }
    }
    return;
  }
  constexpr int kAcross = sizeof(S) == 2 ? 16 : 8, kDown = 32 / kAcross;
  const int blocks_across = (rows + kAcross - 1) / kAcross;
  const int total = rows_fast ? blocks_across * ((width + kDown - 1) / kDown) * 32 : rows * width;
  const Columns columns(view, first);
  TF_UNROLL_BY(4)
  for (int i = threadIdx.x; i < total; i += kThreads) {
    const int block = i / 32, lane = i % 32;
    const int row = rows_fast ? block % blocks_across * kAcross + lane % kAcross : i / width;
    const int column = rows_fast ? block / blocks_across * kDown + lane / kAcross : i % width;
    if (row >= rows || column >= width) continue;
    S* at = data + row * view.row_stride + columns.offset(column);
    if (kLoad) {
      panel[at_panel(plan, row, column)] = column < count ? widen(gload(at)) : Acc(0);
    } else if (column < count) {
      gstore(at, narrow<S>(panel[at_panel(plan, row, column)]));
    }
  }
}

// Columns first … of g, transposed: element (k, row) at k · stride + row, zero rows up to a whole row group. Lanes take
// 8 columns × 4 rows: whole sectors in, and no two in one bank.
template <class Acc>
__device__ __forceinline__ void load_slice(const Acc* matrix, int first, int depth, const GroupActionPlan& plan,
                                           Shared<Acc>* slice) {
  const int h = plan.h, padded = plan.row_groups * kRows, across = (depth + 7) / 8;
  TF_UNROLL_BY(4)
  for (int i = threadIdx.x; i < across * (padded / 4) * 32; i += kThreads) {
    const int block = i / 32, lane = i % 32;
    const int k = block % across * 8 + lane % 8, row = block / across * 4 + lane / 8;
    if (k >= depth) continue;
    slice[k * plan.matrix_stride + row] = row < h ? gload(matrix + row * h + first + k) : Acc(0);
  }
}

// Adds in runs of 64 columns: a single sum over h = 600 was 2.5 times less accurate than torch's product.
template <class Acc>
__device__ __forceinline__ void multiply(const Shared<Acc>* slice, const Shared<Acc>* panel, int first, int depth,
                                         const GroupActionPlan& plan, int row_group, int column_group,
                                         Acc (&results)[kRows][kColumns]) {
  TF_NO_UNROLL
  for (int run = 0; run < depth; run += 64) {
    const int end = depth - run < 64 ? depth : run + 64;
    Acc sums[kRows][kColumns] = {};
    TF_NO_UNROLL
    for (int k = run; k < end; ++k) {
      Acc a[kRows];
      TF_UNROLL
      for (int u = 0; u < kRows; u += 4) {
        const Pack<Acc, 4> quad = sload<4>(slice + k * plan.matrix_stride + row_group * kRows + u);
        TF_UNROLL
        for (int i = 0; i < 4; ++i) a[u + i] = quad.v[i];
      }
      const Pack<Acc, kColumns> b = sload<kColumns>(panel + at_panel(plan, first + k, column_group * kColumns));
      TF_UNROLL
      for (int i = 0; i < kRows; ++i) {
        TF_UNROLL
        for (int j = 0; j < kColumns; ++j) sums[i][j] += a[i] * b.v[j];
      }
    }
    TF_UNROLL
    for (int i = 0; i < kRows * kColumns; ++i) results[i / kColumns][i % kColumns] += sums[i / kColumns][i % kColumns];
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, sizeof(Acc) == 8 ? 1 : 2)
    group_action_kernel(const ActedView* views, const int32_t* owners, GroupActionPlan plan) {
  DYNAMIC_SHARED(memory);
  Shared<Acc>* panel = reinterpret_cast<Shared<Acc>*>(memory);
  Shared<Acc>* slice = panel + (plan.h * plan.width + 31) / 32 * 32;
  const ActedView acted = gload(views + gload(owners + blockIdx.x));
  const View& view = acted.view;
  const int tile = static_cast<int>(blockIdx.x) - view.first_tile;
  const int split = tile % view.splits, head = tile / view.splits;
  const Acc* matrix = static_cast<const Acc*>(acted.matrix) + static_cast<int64_t>(head) * plan.h * plan.h;
  const int row_group = threadIdx.x % plan.row_groups, column_group = threadIdx.x / plan.row_groups;
  const bool works = column_group < plan.column_groups, resident = plan.slice == plan.h;
  const int64_t columns = static_cast<int64_t>(view.outer) * view.inner;
  const int64_t begin = static_cast<int64_t>(split) * view.slot * plan.width;  // slot: panels per block
  const int64_t end = begin + static_cast<int64_t>(view.slot) * plan.width;
  if (resident) load_slice(matrix, 0, plan.h, plan, slice);

  TF_NO_UNROLL
  for (int64_t first = begin; first < end && first < columns; first += plan.width) {
    const int count = static_cast<int>(columns - first < plan.width ? columns - first : plan.width);
    with_storage<Acc>(view.storage, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      move_panel<true>(view, static_cast<S*>(view.data) + head * view.head_stride, first, count, plan, panel);
    });
    Acc results[kRows][kColumns] = {};
    TF_NO_UNROLL
    for (int k = 0; k < plan.h; k += plan.slice) {
      const int depth = plan.h - k < plan.slice ? plan.h - k : plan.slice;
      if (!resident) {
        __syncthreads();
        load_slice(matrix, k, depth, plan, slice);
      }
      __syncthreads();
      if (works) multiply(slice, panel, k, depth, plan, row_group, column_group, results);
    }
    __syncthreads();
    if (works) {
      TF_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int row = row_group * kRows + i;
        if (row >= plan.h) break;
        sstore<kColumns>(panel + at_panel(plan, row, column_group * kColumns),
                         {results[i][0], results[i][1], results[i][2], results[i][3]});
      }
    }
    __syncthreads();
    with_storage<Acc>(view.storage, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      move_panel<false>(view, static_cast<S*>(view.data) + head * view.head_stride, first, count, plan, panel);
    });
  }
}

}  // namespace teleport_fast

using namespace teleport_fast;

int64_t tf_cuda_group_action_widest(int float64) { return float64 ? 512 : 1024; }

int tf_cuda_group_action_plan(ActedView* views, int64_t count, int64_t wanted_blocks, int32_t* owners,
                              GroupActionPlan* plan) {
  *plan = {};
  if (count == 0) return 0;
  const int64_t h = views[0].view.rows;
  plan->float64 = views[0].view.storage == kFloat64;
  if (h > tf_cuda_group_action_widest(plan->float64)) return -1;
  if (h == 0) return 0;
  const int64_t size = plan->float64 ? 8 : 4;
  plan->h = static_cast<int32_t>(h);
  plan->row_groups = static_cast<int32_t>(ceil_div(h, kRows));
  int32_t groups = kThreads / plan->row_groups, power = 1;
  while (power * 2 <= groups && power < 8) power *= 2;
  plan->column_groups = groups / power * power;
  plan->width = plan->column_groups * kColumns;
  plan->swizzle = power - 1;
  plan->matrix_stride = plan->row_groups * kRows + 4;
  const int64_t row_bytes = plan->matrix_stride * size;
  plan->slice = static_cast<int32_t>(h * row_bytes <= kResidentBytes ? h : kSliceBytes / row_bytes);
  plan->shared_bytes = (ceil_div(h * plan->width, 32) * 32 + int64_t{plan->slice} * plan->matrix_stride) * size;
  int64_t panels = 0;
  for (int64_t i = 0; i < count; ++i) {
    View& view = views[i].view;
    if (view.rows != h || (view.storage == kFloat64) != (plan->float64 != 0) || !prepare(view, false)) return -1;
    panels += view.heads * ceil_div(columns_of(view), plan->width);
  }
  // A block takes enough panels that reading g stays under 1/16 of what it moves, and more where there are more than asked.
  int64_t run = ceil_div(panels, wanted_blocks > 0 ? wanted_blocks : 1);
  if (run < ceil_div(8 * h, plan->width)) run = ceil_div(8 * h, plan->width);
  for (int64_t i = 0; i < count; ++i) {
    View& view = views[i].view;
    view.slot = static_cast<int32_t>(run < INT32_MAX ? run : INT32_MAX);
    const int64_t splits = ceil_div(columns_of(view), run * plan->width), tiles = view.heads * splits;
    if (splits > INT32_MAX || plan->tiles + tiles > INT32_MAX) return -1;
    view.splits = static_cast<int32_t>(splits);
    view.first_tile = static_cast<int32_t>(plan->tiles);
    for (int64_t t = 0; owners && t < tiles; ++t) owners[plan->tiles + t] = static_cast<int32_t>(i);
    plan->tiles += tiles;
  }
  return 0;
}

cudaError_t tf_cuda_group_action_(const ActedView* views, const int32_t* owners, const GroupActionPlan* plan,
                                  cudaStream_t stream) {
  if (plan->tiles == 0) return cudaSuccess;
  const unsigned grid = static_cast<unsigned>(plan->tiles);
  const size_t shared = static_cast<size_t>(plan->shared_bytes);
  if (plan->float64) return TF_LAUNCH(group_action_kernel<double>, grid, kThreads, shared, stream, views, owners, *plan);
  return TF_LAUNCH(group_action_kernel<float>, grid, kThreads, shared, stream, views, owners, *plan);
}
