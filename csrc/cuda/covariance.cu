// C ← β C + (1 − β) Σ G Gᵀ / ‖G‖² over a joint's tensors, heads and joints batched, norms never on the host.
//
// Moves each gradient once, C once in and once out, and per view, head and split a triangle of partial products out and in:
// the norm of a view is known only when all its blocks are done (h = 64, 768 columns: 9% of the gradient). Sectors touched
// are at most 1.1 times the bytes used in float32 at widths that are multiples of 4; else C is taken by parts of sectors.
// Launch: gram_difference's kernel with every view a joint of its own, then blocks of 128 threads, 4 × 4 entries each, that
// weigh the views' products by their norms and add them to C in the list's order.
// Loses to the BLAS where gram_difference does.
#include "covariance.h"

#include "gram_panel.h"

namespace teleport_fast {

constexpr int kThreads = 128;
constexpr int kWeights = 128;  // views whose weights a block keeps at a time

struct CovarianceArguments {
  GramPlan plan;
  int32_t run;  // views of one joint
  double decay;
  const void *partials, *traces;
  void* covariance;
};

// (1 − β) / ‖G‖² of a view, 0 where that is not a positive number.
template <class Acc>
__device__ __forceinline__ Acc weight_of(const CovarianceArguments& arguments, int64_t view) {
  const int64_t count = static_cast<int64_t>(arguments.plan.heads) * arguments.plan.splits;
  const Acc* traces = static_cast<const Acc*>(arguments.traces) + view * count;
  Acc norm = 0;
  for (int64_t i = 0; i < count; ++i) norm += gload(traces + i);
  const Acc weight = static_cast<Acc>(1 - arguments.decay) / norm;
  return weight > 0 && weight - weight == 0 ? weight : Acc(0);
}

// decay · C on the thread's tile: in packs where rows are whole ones, since single entries touch each sector twice.
template <class Acc>
__device__ __forceinline__ void read_tile(const Acc* c, int h, int row, int column, Acc decay, Acc (&tile)[4][4]) {
  constexpr int kPiece = sizeof(Acc) == 8 ? 2 : 4;
  TF_UNROLL
  for (int i = 0; i < 4; ++i) {
    TF_UNROLL
    for (int j = 0; j < 4; j += kPiece) {
      if (h % 4 == 0) {
        const Pack<Acc, kPiece> piece = gload(reinterpret_cast<const Pack<Acc, kPiece>*>(c + (row + i) * h + column + j));
        TF_UNROLL
        for (int u = 0; u < kPiece; ++u) tile[i][j + u] = decay * piece.v[u];
      } else {
        TF_UNROLL
        for (int u = 0; u < kPiece; ++u) {
          if (row + i < h && column + j + u < h) tile[i][j + u] = decay * gload(c + (row + i) * h + column + j + u);
        }
      }
    }
  }
}

template <class Acc, int M>
__global__ void __launch_bounds__(kThreads, sizeof(Acc) == 8 ? 2 : 4) covariance_kernel(CovarianceArguments arguments) {
  constexpr int kParts = (M / 4) * (M / 4);
  SHARED_ARRAY(Shared<Acc>, weights, [kWeights]);
  const GramPlan& plan = arguments.plan;
  const int h = plan.h, blocks = (plan.pairs * kParts + kThreads - 1) / kThreads;
  const int owner = blockIdx.x / blocks, at = blockIdx.x % blocks * kThreads + threadIdx.x;
  const int joint = owner / plan.heads, head = owner % plan.heads;
  const int pair = at % plan.pairs, u = at / plan.pairs / (M / 4), v = at / plan.pairs % (M / 4);
  int ti, tj;
  pair_of(pair, ti, tj);
  const int row = (ti + u * plan.side) * 4, column = (tj + v * plan.side) * 4;
  const bool works = at < plan.pairs * kParts && !(ti == tj && u < v) && row < h && column < h;
  const int64_t step = static_cast<int64_t>(plan.pairs) * M * M;
  const Acc* partials = static_cast<const Acc*>(arguments.partials) + pair;
  Acc* covariance = static_cast<Acc*>(arguments.covariance) + static_cast<int64_t>(owner) * h * h;

  Acc tile[4][4] = {};
  if (works) read_tile(covariance, h, row, column, static_cast<Acc>(arguments.decay), tile);
  for (int first = 0; first < arguments.run; first += kWeights) {
    const int count = arguments.run - first < kWeights ? arguments.run - first : kWeights;
    const int64_t view = static_cast<int64_t>(joint) * arguments.run + first;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) weights[threadIdx.x] = weight_of<Acc>(arguments, view + threadIdx.x);
    __syncthreads();
    for (int i = 0; i < count && works; ++i) {
      const Acc weight = weights[i];
      if (weight == 0) continue;
      Acc product[4][4] = {};
      for (int split = 0; split < plan.splits; ++split) {
        const Acc* part = partials + (((view + i) * plan.heads + head) * plan.splits + split) * step;
        TF_UNROLL
        for (int e = 0; e < 16; ++e) {
          product[e / 4][e % 4] += gload(part + ((u * 4 + e / 4) * M + v * 4 + e % 4) * plan.pairs);
        }
      }
      TF_UNROLL
      for (int e = 0; e < 16; ++e) tile[e / 4][e % 4] += weight * product[e / 4][e % 4];
    }
  }
  if (works) write_tile(covariance, h, row, column, tile, ti != tj || u != v);
}

template <class Acc, int M>
cudaError_t run(const CovarianceArguments& arguments, cudaStream_t stream) {
  const GramPlan& plan = arguments.plan;
  const unsigned blocks = static_cast<unsigned>(ceil_div(int64_t{plan.pairs} * (M / 4) * (M / 4), kThreads));
  const unsigned owners = static_cast<unsigned>(plan.joints / arguments.run) * plan.heads;
  return TF_LAUNCH((covariance_kernel<Acc, M>), owners * blocks, kThreads, 0, stream, arguments);
}

}  // namespace teleport_fast

using namespace teleport_fast;

int tf_cuda_covariance_plan(View* views, GramPlan* plan, int64_t wanted_blocks, int64_t shared_limit) {
  if (plan->plus != 0 || plan->minus != 1) return -1;
  plan->keep_partials = 1;
  return tf_cuda_gram_difference_plan(views, plan, wanted_blocks, shared_limit);
}

cudaError_t tf_cuda_covariance_(const View* views, const GramPlan* plan, int64_t joints, double decay, void* workspace,
                                void* covariance, cudaStream_t stream) {
  if (joints < 1 || plan->joints % joints != 0) return static_cast<cudaError_t>(1);
  cudaError_t error = tf_cuda_gram_difference(views, plan, workspace, nullptr, nullptr, stream);
  if (error != cudaSuccess) return error;
  const int64_t size = plan->float64 ? 8 : 4, parts = int64_t{plan->joints} * plan->heads * plan->splits;
  const void* traces = static_cast<char*>(workspace) + size * (plan->partials - parts);
  const CovarianceArguments arguments{*plan, static_cast<int32_t>(plan->joints / joints), decay, workspace, traces,
                                      covariance};
  if (plan->float64) return run<double, 4>(arguments, stream);
  if (plan->micro == 4) return run<float, 4>(arguments, stream);
  return run<float, 8>(arguments, stream);
}
