// An optimizer's step in a turned basis and back, G' = L G Rᵀ, moments, U, A ← keep A − rate Lᵀ U R, a bucket in one launch.
//
// Moves the minimum for Adam: gradient, parameter and both moments in, the latter three out (28 bytes an entry in float32).
// With descriptors and a basis read once 1.01 times that, as the tests count it. Each block reads the basis, the later ones from
// the second-level cache: with 528 blocks wanted for 12 heads 1.07 (h = 64, 768 columns), for 4 heads 1.28 (h = 128, 1,024).
// Launch: 256 threads take (entry, head, a run of panels). A panel lies in shared memory: all turned rows × as many columns
// as give each thread 8 × 4 results; a turn on the right alone is a turn on the left of the transposed view, and turns on
// both sides take the whole matrix as one panel (up to 8,192 entries). Global memory is read and written along each
// tensor's own fast axis. Row norms over columns that are not in one panel take two launches, the first for sums of squares,
// and 1.24 times the least bytes, with Nesterov's look ahead more, as the second reads gradients again.
// The line: a turned side of up to 128. A turn and its way back are 4 h operations on 28 bytes, at h = 128 18 a byte, and an
// H100 does 20 in float32 while it moves one; above, the product and no longer memory sets the time, and the BLAS's is
// better: it turns, and this kernel does the part between (kTurnedPart) and the update (kUpdate). So it does for sides that
// shared memory does not hold, and for a right side of columns with two strides.
// Loses to plain torch for one small matrix (unmeasured), and where a moment is laid out across its parameter's panel.
#include "rotate_step.h"

#include <cmath>

#include "turned_panel.h"

namespace teleport_fast {

constexpr int kMostTurned = 128;
constexpr int64_t kStaticBytes = 1024;  // of shared memory, the norms of 128 rows

enum Stage : int32_t { kFromMoment = 1, kTurn = 2, kMap = 4, kStoreMoments = 8, kSums = 16, kNorms = 32, kBack = 64, kKeep = 128 };

template <class Acc>
struct Numbers {
  Acc beta1, beta2, rest1, rest2, eps, keep, rate, scale, old, fresh;
};

struct RotateArguments {
  const RotateView* views;
  RotatePlan plan;
  int32_t stages;
  void* sums;
};

// Global memory → panel, zeros where the matrix ends.
template <class Acc>
__device__ __forceinline__ void load_panel(const View* from, const Panel& at, const RotatePlan& plan, Shared<Acc>* panel) {
  const Operand x(gload(from), at);
  for_pieces<Acc>(x.view, plan.row_groups * kRows, plan.width, [&](auto n, int row, int column) {
    constexpr int N = decltype(n)::value;
    Acc values[N] = {};
    if (row < at.rows && column < at.count) read(x.view, x.at(row, column), values);
    put(panel, plan.width, row, column, x.view.rows_fast, values);
  });
}

// The moments take up the turned gradient, and the panel becomes U, or the first moment for row norms.
template <class Acc>
__device__ __forceinline__ void map_panel(const RotateView* entry, const Panel& at, const RotateArguments& arguments,
                                          const Numbers<Acc>& numbers, Shared<Acc>* panel) {
  const RotatePlan& plan = arguments.plan;
  const bool adam = plan.base == kAdam;
  const Operand first(gload(entry->views + 2), at), second(gload(entry->views + 3), at);
  for_pieces<Acc>(first.view, at.rows, at.count, [&](auto n, int row, int column) {
    constexpr int N = decltype(n)::value;
    Acc x[N], m[N], v[N] = {};
    read(first.view, first.at(row, column), m);
    if (adam) read(second.view, second.at(row, column), v);
    take(panel, plan.width, row, column, first.view.rows_fast, x);
    TF_UNROLL
    for (int j = 0; j < N; ++j) {
      m[j] = numbers.rest1 * x[j] + numbers.beta1 * m[j];
      v[j] = numbers.rest2 * x[j] * x[j] + numbers.beta2 * v[j];
      const Acc u = numbers.fresh * x[j] + numbers.old * m[j];
      if (adam) {
        x[j] = u / (sqrt(v[j]) * numbers.scale + numbers.eps);
      } else {
        x[j] = plan.base == kSign ? Acc(u > 0) - Acc(u < 0) : u;
      }
    }
    if (arguments.stages & kStoreMoments) {
      write(first.view, first.at(row, column), m);
      if (adam) write(second.view, second.at(row, column), v);
    }
    put(panel, plan.width, row, column, first.view.rows_fast, x);
  });
}

// The panel goes out: taken off the parameter where kKeep, else as it is.
template <class Acc>
__device__ __forceinline__ void store_panel(const View* to, const Panel& at, const RotatePlan& plan, bool keep,
                                            const Numbers<Acc>& numbers, const Shared<Acc>* panel) {
  const Operand out(gload(to), at);
  for_pieces<Acc>(out.view, at.rows, at.count, [&](auto n, int row, int column) {
    constexpr int N = decltype(n)::value;
    Acc p[N] = {}, x[N];
    if (keep) read(out.view, out.at(row, column), p);
    take(panel, plan.width, row, column, out.view.rows_fast, x);
    TF_UNROLL
    for (int j = 0; j < N; ++j) p[j] = keep ? p[j] * numbers.keep - numbers.rate * x[j] : x[j];
    write(out.view, out.at(row, column), p);
  });
}

// Divides the lines of the panel by their root mean square + eps: the matrix's rows, which are columns here where it is
// transposed; sums: of whole rows from the launch before, null where the panel holds all of them.
template <class Acc>
__device__ __forceinline__ void normalise(const Panel& at, const RotatePlan& plan, const Numbers<Acc>& numbers,
                                          const Shared<Acc>* sums, Shared<Acc>* panel) {
  const bool transposed = plan.fused_right && !plan.fused_left;
  if (transposed) {
    TF_NO_UNROLL
    for (int c = threadIdx.x; c < at.count; c += kThreads) {
      Acc sum = 0;
      TF_NO_UNROLL
      for (int r = 0; r < at.rows; ++r) {
        const Acc x = panel[at_quad<32>(plan.width, r, c / 4) + c % 4];
        sum += x * x;
      }
      const Acc norm = sqrt(sum / static_cast<Acc>(plan.rows)) + numbers.eps;
      TF_NO_UNROLL
      for (int r = 0; r < at.rows; ++r) {
        const int place = at_quad<32>(plan.width, r, c / 4) + c % 4;
        panel[place] = Acc(panel[place]) / norm;
      }
    }
    return;
  }
  TF_NO_UNROLL
  for (int r = threadIdx.x / 32; r < at.rows; r += kThreads / 32) {
    const Acc sum = sums ? Acc(sums[r]) : row_squares(panel, plan.width, r, at.count);
    const Acc norm = sqrt(sum / static_cast<Acc>(plan.columns)) + numbers.eps;
    TF_NO_UNROLL
    for (int c = threadIdx.x % 32; c < at.count; c += 32) {
      const int place = at_quad<32>(plan.width, r, c / 4) + c % 4;
      panel[place] = Acc(panel[place]) / norm;
    }
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, sizeof(Acc) == 8 ? 1 : 2)
    rotate_step_kernel(RotateArguments arguments, Numbers<Acc> numbers) {
  DYNAMIC_SHARED(memory);
  SHARED_ARRAY(Shared<Acc>, sums, [kMostTurned]);
  const RotatePlan& plan = arguments.plan;
  const int stages = arguments.stages, width = plan.width, padded = plan.row_groups * kRows, stride = (padded + 31) / 32 * 32;
  const bool turned = plan.fused_left || plan.fused_right, both = plan.fused_left && plan.fused_right;
  Shared<Acc>* panel = reinterpret_cast<Shared<Acc>*>(memory);
  Shared<Acc>* row_basis = panel + padded * width;
  Shared<Acc>* column_basis = row_basis + padded * stride;

  const int entry = blockIdx.x / plan.tiles, tile = blockIdx.x % plan.tiles, split = tile % plan.splits;
  const int line = tile / plan.splits, row_block = line % plan.row_blocks;
  const RotateView* view = arguments.views + entry;
  Panel at{line / plan.row_blocks, 0, row_block * plan.panel_rows, plan.panel_rows, 0};
  if (plan.rows - at.first_row < at.rows) at.rows = plan.rows - at.first_row;
  Place place{static_cast<int>(threadIdx.x) % plan.row_groups, static_cast<int>(threadIdx.x) / plan.row_groups, plan.row_groups};

  if (turned && stages & (kTurn | kBack)) {
    const int64_t own = plan.fused_left ? int64_t{at.head} * plan.rows * plan.rows : 0;
    load_basis(static_cast<const Acc*>(gload(view->bases + (plan.fused_left ? 0 : 1))) + own, plan.rows, padded, stride, row_basis);
    if (both) load_basis(static_cast<const Acc*>(gload(view->bases + 1)), plan.columns, width, width, column_basis);
  }
  // Sums of squares: (entry, head, row, panel).
  Acc* all_sums = static_cast<Acc*>(arguments.sums) + ((int64_t{entry} * plan.heads + at.head) * plan.rows + at.first_row) * plan.panels;
  if (stages & kNorms && !plan.whole_rows) {
    TF_NO_UNROLL
    for (int r = threadIdx.x / 32; r < at.rows; r += kThreads / 32) {
      Acc sum = 0;
      TF_NO_UNROLL
      for (int i = threadIdx.x % 32; i < plan.panels; i += 32) sum += gload(all_sums + int64_t{r} * plan.panels + i);
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) sums[r] = sum;
    }
  }

  const int rows4 = (plan.rows + 3) / 4 * 4, columns4 = (plan.columns + 3) / 4 * 4;
  const int end = plan.panels - split * plan.run < plan.run ? plan.panels : (split + 1) * plan.run;
  TF_NO_UNROLL
  for (int index = split * plan.run; index < end; ++index) {
    at.first = index * width;
    at.count = plan.columns - at.first < width ? plan.columns - at.first : width;
    load_panel(view->views + (stages & kFromMoment ? 2 : 1), at, plan, panel);
    __syncthreads();
    if (stages & kTurn && turned) {
      turn_panel<false, true>(row_basis, stride, panel, width, rows4, place, plan.column_groups, panel, width);
      if (both) {
        turn_panel<false, false>(panel, width, column_basis, width, columns4, place, plan.column_groups, panel, width);
      }
    }
    if (stages & kMap) {
      map_panel(view, at, arguments, numbers, panel);
      __syncthreads();
    }
    if (stages & kSums) {
      TF_NO_UNROLL
      for (int r = threadIdx.x / 32; r < at.rows; r += kThreads / 32) {
        const Acc sum = row_squares(panel, plan.width, r, at.count);
        if (threadIdx.x % 32 == 0) gstore(all_sums + int64_t{r} * plan.panels + index, sum);
      }
      __syncthreads();
      continue;
    }
    if (stages & kNorms) {
      normalise(at, plan, numbers, plan.whole_rows ? nullptr : &sums[0], panel);
      __syncthreads();
    }
    if (stages & kBack && turned) {
      if (both) {
        turn_panel<false, true>(panel, width, column_basis, width, columns4, place, plan.column_groups, panel, width);
      }
      turn_panel<true, true>(row_basis, stride, panel, width, rows4, place, plan.column_groups, panel, width);
    }
    store_panel(view->views, at, plan, (stages & kKeep) != 0, numbers, panel);
    __syncthreads();
  }
}

int64_t bytes_of(const RotatePlan& plan) {
  const int64_t padded = plan.row_groups * kRows, stride = ceil_div(padded, 32) * 32, width = plan.width;
  int64_t elements = padded * width;
  if (plan.fused_left || plan.fused_right) elements += padded * stride;
  if (plan.fused_left && plan.fused_right) elements += width * width;
  return elements * (plan.float64 ? 8 : 4) + kStaticBytes;
}

// Cuts a matrix into panels; false where the sides that are to be turned do not fit.
bool cut(RotatePlan& plan, int64_t rows, int64_t columns, bool left, bool right, int64_t shared_limit) {
  const bool turned = left || right;
  if (turned && rows > kMostTurned) return false;
  plan.fused_left = left, plan.fused_right = right;
  plan.rows = static_cast<int32_t>(rows), plan.columns = static_cast<int32_t>(columns);
  // Rows that nothing turns are cut too: 32 of them are whole sectors in every storage, also where rows are fast.
  plan.panel_rows = static_cast<int32_t>(turned || rows < 32 ? rows : 32);
  plan.row_groups = static_cast<int32_t>(ceil_div(plan.panel_rows, kRows));
  int64_t groups = kThreads / plan.row_groups / 8 * 8;
  const int64_t needed = ceil_div(columns, 32) * 8;
  if (left && right && needed > groups) return false;
  if (groups > needed) groups = needed;
  for (; groups >= 8; groups = groups / 2 / 8 * 8) {
    plan.column_groups = static_cast<int32_t>(groups);
    plan.width = plan.column_groups * kColumns;
    if (bytes_of(plan) <= shared_limit) return true;
    if (left && right) return false;
  }
  return false;
}

// Rows and columns exchanged; false where the columns are no single run.
bool transpose(View& view) {
  if (view.outer != 1) return false;
  const int64_t stride = view.row_stride;
  const int32_t rows = view.rows;
  view.row_stride = view.inner_stride, view.inner_stride = stride;
  view.rows = view.inner, view.inner = rows;
  view.outer_stride = 0;
  return prepare(view, false);
}

// Which sides to turn, both if they fit, else the left one, else the right one; views transposed as the kernel takes them.
bool choose(RotateView* views, int64_t count, int64_t h, int64_t n, int64_t shared_limit, RotatePlan& plan) {
  bool flat = true;
  for (int64_t i = 0; i < 4 * count; ++i) flat = flat && views[i / 4].views[i % 4].outer == 1;
  if (plan.left && plan.right && n <= kMostTurned && cut(plan, h, n, true, true, shared_limit)) return true;
  if (plan.left && cut(plan, h, n, true, false, shared_limit)) return true;
  if (!plan.right || !flat || n > kMostTurned || !cut(plan, n, h, false, true, shared_limit)) {
    return cut(plan, h, n, false, false, shared_limit);
  }
  for (int64_t i = 0; i < 4 * count; ++i) {
    if (!transpose(views[i / 4].views[i % 4])) return false;
  }
  return true;
}

template <class Acc>
cudaError_t run(const RotateView* views, int64_t count, const RotatePlan& plan, const RotateStep& s, void* workspace,
                cudaStream_t stream) {
  const Numbers<Acc> numbers{static_cast<Acc>(s.beta1),
                             static_cast<Acc>(s.beta2),
                             static_cast<Acc>(1 - s.beta1),
                             static_cast<Acc>(1 - s.beta2),
                             static_cast<Acc>(s.eps),
                             static_cast<Acc>(1 - s.lr * s.weight_decay),
                             static_cast<Acc>(plan.base == kAdam ? s.lr / (1 - std::pow(s.beta1, s.step + s.nesterov)) : s.lr),
                             static_cast<Acc>(1 / std::sqrt(1 - std::pow(s.beta2, s.step))),
                             static_cast<Acc>(s.nesterov != 0 ? s.beta1 : 1),
                             static_cast<Acc>(s.nesterov != 0 ? 1 - s.beta1 : 0)};
  auto launch = [&](int32_t stages) {
    const RotateArguments arguments{views, plan, stages, workspace};
    const unsigned grid = static_cast<unsigned>(count * plan.tiles);
    const size_t shared = static_cast<size_t>(plan.shared_bytes);
    return TF_LAUNCH(rotate_step_kernel<Acc>, grid, kThreads, shared, stream, arguments, numbers);
  };
  if (plan.part == kUpdate) return launch(kKeep);
  const int32_t gather = kTurn | kMap, finish = kBack | (plan.part == kWholeStep ? kKeep : 0);
  if (plan.base != kRowNorm) return launch(gather | kStoreMoments | finish);
  if (plan.whole_rows) return launch(gather | kStoreMoments | kNorms | finish);
  const bool resume = plan.resume && s.nesterov == 0;
  const cudaError_t error = launch(gather | kSums | (resume ? kStoreMoments : 0));
  if (error != cudaSuccess) return error;
  return launch((resume ? kFromMoment : gather | kStoreMoments) | kNorms | finish);
}

}  // namespace teleport_fast

using namespace teleport_fast;

int tf_cuda_rotate_step_plan(RotateView* views, int64_t count, int64_t wanted_blocks, int64_t shared_limit, RotatePlan* plan) {
  plan->tiles = 0;
  plan->workspace = plan->shared_bytes = 0;
  plan->fused_left = plan->left, plan->fused_right = plan->right;
  if (count == 0) return 0;
  const View like = views[0].views[0];
  const int64_t h = like.rows, n = columns_of(like);
  plan->heads = like.heads;
  plan->resume = 1;
  for (int64_t i = 0; i < 4 * count; ++i) {
    View& view = views[i / 4].views[i % 4];
    if (view.heads != like.heads || view.rows != h || columns_of(view) != n) return -1;
    if ((view.storage == kFloat64) != (plan->float64 != 0) || !prepare(view, false)) return -1;
    // The second launch of row norms starts from the first moments if these lost nothing in storage.
    if (i % 4 == 2 && view.storage != (plan->float64 ? kFloat64 : kFloat32)) plan->resume = 0;
  }
  if (like.heads == 0 || h == 0 || n == 0) return 0;
  if (n > INT32_MAX) return -1;
  if (!choose(views, count, h, n, shared_limit, *plan)) return -1;
  for (int64_t i = 0; i < count; ++i) {
    // Moments are taken together: in packs only where both lie alike.
    View &first = views[i].views[2], &second = views[i].views[3];
    first.vector = first.vector && second.vector && first.rows_fast == second.rows_fast;
  }
  const bool transposed = plan->fused_right && !plan->fused_left;
  // The kernel counts columns, whole panels of them, in 32 bits.
  if (plan->columns > INT32_MAX - plan->width) return -1;
  const int64_t panels = ceil_div(plan->columns, plan->width);
  plan->panels = static_cast<int32_t>(panels);
  plan->whole_rows = transposed || panels == 1;
  plan->row_blocks = static_cast<int32_t>(ceil_div(plan->rows, plan->panel_rows));
  const int64_t lines = int64_t{plan->heads} * plan->row_blocks;
  const int64_t wanted = wanted_blocks > 0 ? wanted_blocks : 1, run = ceil_div(count * lines * panels, wanted);
  plan->run = static_cast<int32_t>(run < panels ? run : panels);
  plan->splits = static_cast<int32_t>(ceil_div(panels, plan->run));
  if (count * lines * plan->splits > INT32_MAX) return -1;
  plan->tiles = static_cast<int32_t>(lines * plan->splits);
  plan->shared_bytes = bytes_of(*plan) - kStaticBytes;
  if (plan->base == kRowNorm && plan->part != kUpdate && !plan->whole_rows) {
    plan->workspace = count * plan->heads * plan->rows * panels;
  }
  return 0;
}

cudaError_t tf_cuda_rotate_step_(const RotateView* views, int64_t count, const RotatePlan* plan, const RotateStep* step,
                                 void* workspace, cudaStream_t stream) {
  if (count * plan->tiles == 0) return cudaSuccess;
  return plan->float64 ? run<double>(views, count, *plan, *step, workspace, stream)
                       : run<float>(views, count, *plan, *step, workspace, stream);
}
