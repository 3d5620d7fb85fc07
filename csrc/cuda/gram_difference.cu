// D = S₋ − S₊ and J = tr S₊ + tr S₋ in one pass over the gradients of a bucket of joints, symmetric half only.
//
// Moves each input once, and D once; where columns are split over blocks, a triangle of partial sums per split goes out
// and in, at most 1/10 of the split's input since a split has at least 10 h columns.
// Launch: a block per joint, head and split; it holds the whole lower triangle of D in registers, 4 × 4 per thread up to
// h = 64 and 8 × 8 above; where that needs few threads, `groups` of them share a panel's columns. A panel is 64 columns
// (16 above h = 64, float64 32) in shared memory; three to four warps do nothing but fetch the next one, so that no thread
// holds both sums and values in flight (one kind of thread for both spilled). After 512 columns sums move to totals in
// shared memory: a single float32 sum over 4,096 columns was 5 times less accurate than the BLAS. A second launch adds the
// splits in order.
// Loses to the BLAS where h is over 256, and for bf16 and fp16 at h ≥ 128, where tensor cores would pay.
#include "gram_difference.h"

#include "gram_panel.h"

namespace teleport_fast {

constexpr int kMostThreads = 640;  // 528 pairs of 32 × 32 micro tiles in whole warps, and three that fetch
constexpr int kFinishThreads = 128;
constexpr int kRun = 512;          // columns that a register sums up before it is added to its total in shared memory
constexpr int kStaticBytes = 256;  // of shared memory, the traces

template <int M>
constexpr int kTotals = M * M + 1;

struct GramArguments {
  const View* views;
  GramPlan plan;
  void *partials, *partial_traces, *d, *trace;
};

// The quad (u, v) of quads of a micro tile: it is its own mirror image's on the diagonal, and redundant above it there.
template <class Acc>
__device__ __forceinline__ void write_part(Acc* d, const GramPlan& plan, int ti, int tj, int u, int v,
                                           Acc (&tile)[4][4]) {
  if (ti == tj && u < v) return;
  write_tile(d, plan.h, (ti + u * plan.side) * 4, (tj + v * plan.side) * 4, tile, ti != tj || u != v);
}

// The block's part of the work: panels begin … end of its joint's, counted through all views.
struct Part {
  int head, begin, end, plus_panels;
  const View* views;

  __device__ __forceinline__ Part(const GramArguments& arguments) {
    const GramPlan& plan = arguments.plan;
    const int split = blockIdx.x % plan.splits, owner = blockIdx.x / plan.splits;  // owner: the joint and head
    head = owner % plan.heads;
    views = arguments.views + static_cast<int64_t>(owner / plan.heads) * (plan.plus + plan.minus);
    int all = 0;
    plus_panels = 0;
    for (int v = 0; v < plan.plus + plan.minus; ++v) {
      all += gload(&views[v].splits);
      if (v < plan.plus) plus_panels = all;
    }
    begin = static_cast<int>(static_cast<int64_t>(all) * split / plan.splits);
    end = static_cast<int>(static_cast<int64_t>(all) * (split + 1) / plan.splits);
  }
};

// The fetching warps' task: panel t goes to buffer t mod 2 while panel t − 1 is multiplied. Returns the squares' sum.
template <class Acc, int K>
__device__ __forceinline__ Acc fetch(const Part& part, const GramPlan& plan, Shared<Acc>* panels, int stride, int padded) {
  Acc squares = 0;
  int before = 0;
  TF_NO_UNROLL
  for (int v = 0; v < plan.plus + plan.minus; ++v) {
    const View view = gload(part.views + v);
    const int low = part.begin > before ? part.begin : before;
    const int high = part.end < before + view.splits ? part.end : before + view.splits;
    TF_NO_UNROLL
    for (int t = low; t < high; ++t) {
      squares += fill_panel<K>(view, part.head, t - before, panels + (t & 1) * K * stride, stride, padded,
                               static_cast<int>(threadIdx.x) - plan.multipliers, blockDim.x - plan.multipliers);
      TASK_BARRIER();
    }
    before += view.splits;
  }
  return squares;
}

// Writes a 4 × 4 part of the thread's sums: to D where they are whole, else to the workspace.
template <class Acc, int M>
__device__ __forceinline__ void write_sums(const GramArguments& arguments, int pair, int ti, int tj, int u, int v,
                                           Acc (&tile)[4][4]) {
  const GramPlan& plan = arguments.plan;
  if (plan.partials == 0) {
    Acc* d = static_cast<Acc*>(arguments.d) + static_cast<int64_t>(blockIdx.x) * plan.h * plan.h;
    write_part(d, plan, ti, tj, u, v, tile);
    return;
  }
  Acc* partials = static_cast<Acc*>(arguments.partials) + static_cast<int64_t>(blockIdx.x) * (plan.pairs * M * M) + pair;
  TF_UNROLL
  for (int i = 0; i < 16; ++i) gstore(partials + ((u * 4 + i / 4) * M + v * 4 + i % 4) * plan.pairs, tile[i / 4][i % 4]);
}

template <class Acc, int M, int K>
__global__ void __launch_bounds__(M == 4 && sizeof(Acc) == 4 ? 416 : kMostThreads, M == 4 && sizeof(Acc) == 4 ? 2 : 1)
    gram_difference_kernel(GramArguments arguments) {
  DYNAMIC_SHARED(memory);
  SHARED_ARRAY(Shared<Acc>, traces, [kMostThreads / 32]);
  Shared<Acc>* panels = reinterpret_cast<Shared<Acc>*>(memory);
  const GramPlan& plan = arguments.plan;
  const Part part(arguments);
  const int padded = M * plan.side, stride = (padded + 31) / 32 * 32, thread = threadIdx.x;
  // A thread's totals lie side by side, so that their offsets are constants, an odd number apart, against bank conflicts.
  Shared<Acc>*totals = panels + 2 * K * stride, *mine = totals + thread * kTotals<M>;

  if (thread >= plan.multipliers) {
    const Acc trace = warp_sum(fetch<Acc, K>(part, plan, panels, stride, padded));
    if (thread % 32 == 0) traces[(thread - plan.multipliers) / 32] = trace;
    TASK_BARRIER();
    TASK_BARRIER();
    if (thread == plan.multipliers) {
      Acc whole = 0;
      for (int warp = 0; warp < (plan.threads - plan.multipliers) / 32; ++warp) whole += traces[warp];
      Acc* out = static_cast<Acc*>(plan.partials == 0 ? arguments.trace : arguments.partial_traces);
      gstore(out + blockIdx.x, whole);
    }
    return;
  }

  const int pair = thread % plan.pairs;
  const bool works = thread < plan.pairs * plan.groups;
  int ti, tj;
  pair_of(pair, ti, tj);
  Acc sums[M][M] = {};
  for (int i = 0; i < M * M && works; ++i) mine[i] = 0;
  TF_NO_UNROLL
  for (int t = part.begin; t < part.end; ++t) {
    TASK_BARRIER();
    if (!works) continue;
    add_products<K, M>(panels + (t & 1) * K * stride, stride, plan.side, ti, tj, thread / plan.pairs, plan.groups, sums);
    const int next = t + 1;
    if (next != part.end && next != part.plus_panels && next % (kRun / K) != 0) continue;
    TF_UNROLL
    for (int i = 0; i < M * M; ++i) {
      mine[i] += next <= part.plus_panels ? -sums[i / M][i % M] : sums[i / M][i % M];
      sums[i / M][i % M] = 0;
    }
  }

  TASK_BARRIER();
  if (plan.groups > 1) {
    for (int at = thread; at < M * M * plan.pairs; at += plan.multipliers) {
      Shared<Acc>* place = totals + at / (M * M) * kTotals<M> + at % (M * M);
      Acc whole = *place;
      for (int group = 1; group < plan.groups; ++group) whole += place[group * plan.pairs * kTotals<M>];
      *place = whole;
    }
  }
  TASK_BARRIER();
  if (thread >= plan.pairs) return;
  TF_NO_UNROLL
  for (int u = 0; u < M / 4; ++u) {
    TF_NO_UNROLL
    for (int v = 0; v < M / 4; ++v) {
      Acc tile[4][4];
      TF_UNROLL
      for (int i = 0; i < 16; ++i) tile[i / 4][i % 4] = mine[(u * 4 + i / 4) * M + v * 4 + i % 4];
      write_sums<Acc, M>(arguments, pair, ti, tj, u, v, tile);
    }
  }
}

template <class Acc, int M>
__global__ void __launch_bounds__(kFinishThreads) gram_difference_finish_kernel(GramArguments arguments) {
  constexpr int kParts = (M / 4) * (M / 4);
  const GramPlan& plan = arguments.plan;
  const int blocks = (plan.pairs * kParts + kFinishThreads - 1) / kFinishThreads;
  const int owner = blockIdx.x / blocks, at = blockIdx.x % blocks * kFinishThreads + threadIdx.x;
  if (at == 0) {
    Acc trace = 0;
    const Acc* traces = static_cast<const Acc*>(arguments.partial_traces) + static_cast<int64_t>(owner) * plan.splits;
    for (int split = 0; split < plan.splits; ++split) trace += gload(traces + split);
    gstore(static_cast<Acc*>(arguments.trace) + owner, trace);
  }
  if (at >= plan.pairs * kParts) return;
  const int pair = at % plan.pairs, u = at / plan.pairs / (M / 4), v = at / plan.pairs % (M / 4);
  int ti, tj;
  pair_of(pair, ti, tj);
  if (ti == tj && u < v) return;
  const int64_t step = static_cast<int64_t>(plan.pairs) * M * M;
  const Acc* partials = static_cast<const Acc*>(arguments.partials) + owner * plan.splits * step + pair;
  Acc tile[4][4] = {};
  for (int split = 0; split < plan.splits; ++split) {
    TF_UNROLL
    for (int i = 0; i < 16; ++i) {
      tile[i / 4][i % 4] += gload(partials + split * step + ((u * 4 + i / 4) * M + v * 4 + i % 4) * plan.pairs);
    }
  }
  Acc* d = static_cast<Acc*>(arguments.d) + static_cast<int64_t>(owner) * plan.h * plan.h;
  write_part(d, plan, ti, tj, u, v, tile);
}

template <class Acc, int M, int K>
cudaError_t run(const GramArguments& arguments, cudaStream_t stream) {
  const GramPlan& plan = arguments.plan;
  const unsigned owners = static_cast<unsigned>(plan.joints) * plan.heads;
  cudaError_t error = TF_LAUNCH((gram_difference_kernel<Acc, M, K>), owners * plan.splits, plan.threads,
                                static_cast<size_t>(plan.shared_bytes), stream, arguments);
  if (error != cudaSuccess || plan.partials == 0 || plan.keep_partials) return error;
  const unsigned blocks = static_cast<unsigned>(ceil_div(int64_t{plan.pairs} * (M / 4) * (M / 4), kFinishThreads));
  return TF_LAUNCH((gram_difference_finish_kernel<Acc, M>), owners * blocks, kFinishThreads, 0, stream, arguments);
}

}  // namespace teleport_fast

using namespace teleport_fast;

int64_t tf_cuda_gram_difference_widest(int float64, int64_t shared_limit) {
  for (int h = float64 ? 128 : 256; h > 0; --h) {
    GramPlan plan{1, 1, h, 0, 1, float64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    View view{};
    view.heads = 1, view.rows = h, view.outer = 1, view.storage = float64 ? kFloat64 : kFloat32;
    if (tf_cuda_gram_difference_plan(&view, &plan, 1, shared_limit) == 0) return h;
  }
  return 0;
}

int tf_cuda_gram_difference_plan(View* views, GramPlan* plan, int64_t wanted_blocks, int64_t shared_limit) {
  const int64_t h = plan->h, per_joint = int64_t{plan->plus} + plan->minus;
  if (h < 1 || h > (plan->float64 ? 128 : 256) || plan->joints < 1 || plan->heads < 1) return -1;
  const bool wide = h > 64 && !plan->float64;
  const int64_t k = wide ? 16 : plan->float64 ? 32 : 64;
  plan->micro = wide ? 8 : 4;
  plan->side = static_cast<int32_t>(ceil_div(h, plan->micro));
  plan->pairs = plan->side * (plan->side + 1) / 2;
  plan->groups = 1;
  while (plan->pairs * plan->groups * 2 <= (plan->micro == 4 ? 288 : 544) && plan->groups * 2 <= k) plan->groups *= 2;
  plan->multipliers = static_cast<int32_t>(ceil_div(int64_t{plan->pairs} * plan->groups, 32) * 32);
  plan->threads = plan->multipliers > 512 ? kMostThreads : plan->multipliers + 128;
  const int64_t padded = int64_t{plan->micro} * plan->side;
  int64_t columns = 0, panels_of_joint = 0;
  for (int64_t i = 0; i < plan->joints * per_joint; ++i) {
    View& view = views[i];
    if (i % per_joint == 0) panels_of_joint = 0;
    if (view.heads != plan->heads || view.rows != h || (view.storage == kFloat64) != (plan->float64 != 0)) return -1;
    if (!prepare(view, false)) return -1;
    panels_of_joint += ceil_div(columns_of(view), k);
    if (panels_of_joint > INT32_MAX) return -1;
    view.splits = static_cast<int32_t>(ceil_div(columns_of(view), k));  // here: its panels
    if (i < per_joint) columns += columns_of(view);
  }
  const int64_t owners = int64_t{plan->joints} * plan->heads, fewest = 10 * h > 1024 ? 10 * h : 1024;
  int64_t splits = ceil_div(wanted_blocks, owners);
  if (splits > columns / fewest) splits = columns / fewest;
  plan->splits = static_cast<int32_t>(splits > 1 ? splits : 1);
  if (owners * plan->splits > INT32_MAX) return -1;
  const int64_t size = plan->float64 ? 8 : 4, triangle = int64_t{plan->pairs} * plan->micro * plan->micro;
  const int64_t panels = 2 * k * ceil_div(padded, 32) * 32;
  plan->shared_bytes = size * (panels + (triangle + plan->pairs) * plan->groups);
  if (plan->shared_bytes + kStaticBytes > shared_limit) return -1;
  plan->partials = plan->splits > 1 || plan->keep_partials ? owners * plan->splits * (triangle + 1) : 0;
  return 0;
}

cudaError_t tf_cuda_gram_difference(const View* views, const GramPlan* plan, void* workspace, void* d, void* trace,
                                    cudaStream_t stream) {
  const int64_t size = plan->float64 ? 8 : 4, parts = int64_t{plan->joints} * plan->heads * plan->splits;
  void* partial_traces = static_cast<char*>(workspace) + size * (plan->partials - parts);
  const GramArguments arguments{views, *plan, workspace, partial_traces, d, trace};
  if (plan->float64) return run<double, 4, 32>(arguments, stream);
  if (plan->micro == 4) return run<float, 4, 64>(arguments, stream);
  return run<float, 8, 16>(arguments, stream);
}
