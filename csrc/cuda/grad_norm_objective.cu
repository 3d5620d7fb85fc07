// J = tr(P⁻¹S₊) + tr(P S₋), P = gᵀ g, for many candidates g in one launch: an inverse by elimination, two weighed Grams.
//
// Moves g once in and J once out; a Gram comes in once per candidate, from the second-level cache after the first
// (candidates of one matrix are neighbouring blocks). No inverse, product or temporary is written to global memory.
// Launch: one block per candidate and matrix, a thread per 4 × 4 tile up to 256 of them; g and one Gram lie in shared memory.
// Loses to plain torch where few matrices are wide: an elimination has h steps of three barriers each, and one block
// works on one matrix (h over 64 with fewer blocks than the device has multiprocessors).
#include "grad_norm_objective.h"

#include "device.h"

namespace teleport_fast {

constexpr int kMostThreads = 256;

struct ObjectiveArguments {
  int64_t matrices, candidates;
  int32_t h, stride;
  const void *g, *minus_gram_plus, *gram_minus;
  void* objective;
};

// Copies h × h into shared memory, transposed where `turned`; what lies between h and the stride's whole quads stays zero.
template <class Acc>
__device__ __forceinline__ void load_matrix(const Acc* from, int h, int stride, bool turned, Shared<Acc>* to) {
  for (int i = threadIdx.x; i < h * h; i += blockDim.x) {
    const int row = i / h, column = i % h;
    to[turned ? column * stride + row : row * stride + column] = gload(from + i);
  }
}

// The thread's share of Σ_c xᵀ gram x over the columns x of X.
template <class Acc>
__device__ __forceinline__ Acc weigh(const Shared<Acc>* X, const Shared<Acc>* gram, int h, int stride) {
  const int side = (h + 3) / 4;
  Acc sum = 0;
  TF_NO_UNROLL
  for (int tile = threadIdx.x; tile < side * side; tile += blockDim.x) {
    const int row = tile / side * 4, column = tile % side * 4;
    Acc product[4][4] = {};
    TF_NO_UNROLL
    for (int k = 0; k < h; ++k) {
      // gram is symmetric: its row k is the column that the product wants
      const Pack<Acc, 4> a = sload<4>(gram + k * stride + row), b = sload<4>(X + k * stride + column);
      TF_UNROLL
      for (int i = 0; i < 16; ++i) product[i / 4][i % 4] += a.v[i / 4] * b.v[i % 4];
    }
    TF_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (row + i >= h) break;
      const Pack<Acc, 4> x = sload<4>(X + (row + i) * stride + column);
      TF_UNROLL
      for (int j = 0; j < 4; ++j) sum += x.v[j] * product[i][j];
    }
  }
  return sum;
}

// What one step of the elimination decides, by the first warp: the pivot's row, its value, and the other rows' factors.
template <class Acc>
__device__ __forceinline__ void choose_pivot(const Shared<Acc>* a, int h, int stride, int k, Shared<Acc>* factors,
                                             Shared<int32_t>* pivot, Shared<Acc>* value) {
  const int lane = threadIdx.x;
  Acc largest = -1;
  int best = k;
  for (int i = lane; i < h; i += 32) {
    const Acc x = a[i * stride + k];
    factors[i] = x;
    if (i < k) continue;
    const Acc size = x == x ? fabs(x) : static_cast<Acc>(INFINITY);
    if (size > largest) largest = size, best = i;
  }
  TF_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const Acc other = __shfl_xor_sync(kFullWarp, largest, lanes);
    const int place = __shfl_xor_sync(kFullWarp, best, lanes);
    // of equal ones the first, whatever the order they meet in
    if (other > largest || (other == largest && place < best)) largest = other, best = place;
  }
  __syncwarp();
  if (lane == 0) {
    const Acc found = factors[best];
    if (best != k) factors[best] = factors[k];
    *pivot = best;
    *value = found;
  }
}

// Gauss-Jordan with partial pivoting in place. The inverse's columns come out in the pivots' order, which a sum over
// columns does not see. False, for all threads alike, where no pivot is left.
template <class Acc>
__device__ __forceinline__ bool invert(Shared<Acc>* a, int h, int stride, Shared<Acc>* factors, Shared<int32_t>* pivot,
                                       Shared<Acc>* value) {
  TF_NO_UNROLL
  for (int k = 0; k < h; ++k) {
    if (threadIdx.x < 32) choose_pivot(a, h, stride, k, factors, pivot, value);
    __syncthreads();
    const int row = *pivot;
    const Acc found = *value;
    if (found == 0) return false;
    for (int j = threadIdx.x; j < h; j += blockDim.x) {
      const Acc x = a[row * stride + j];
      if (row != k) a[row * stride + j] = Acc(a[k * stride + j]);
      a[k * stride + j] = (j == k ? Acc(1) : x) / found;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < h * h; i += blockDim.x) {
      const int r = i / h, j = i % h;
      if (r == k) continue;
      const Acc old = j == k ? Acc(0) : Acc(a[r * stride + j]);
      a[r * stride + j] = old - Acc(factors[r]) * Acc(a[k * stride + j]);
    }
    __syncthreads();
  }
  return true;
}

template <class Acc>
__global__ void __launch_bounds__(kMostThreads) grad_norm_objective_kernel(ObjectiveArguments arguments) {
  DYNAMIC_SHARED(memory);
  SHARED_ARRAY(Shared<Acc>, sums, [kMostThreads / 32]);
  SHARED_ARRAY(Shared<Acc>, value, [1]);
  SHARED_ARRAY(Shared<int32_t>, pivot, [1]);
  const int h = arguments.h, stride = arguments.stride;
  Shared<Acc>* X = reinterpret_cast<Shared<Acc>*>(memory);
  Shared<Acc>* gram = X + h * stride;
  Shared<Acc>* factors = gram + h * stride;
  const int64_t matrix = blockIdx.x / arguments.candidates, candidate = blockIdx.x % arguments.candidates;
  const int64_t place = candidate * arguments.matrices + matrix, size = static_cast<int64_t>(h) * h;

  for (int i = threadIdx.x; i < 2 * h * stride; i += blockDim.x) X[i] = 0;
  __syncthreads();
  load_matrix(static_cast<const Acc*>(arguments.g) + place * size, h, stride, arguments.gram_minus != nullptr, X);
  Acc sum = 0;
  bool regular = true;
  if (arguments.gram_minus) {
    load_matrix(static_cast<const Acc*>(arguments.gram_minus) + matrix * size, h, stride, false, gram);
    __syncthreads();
    sum = weigh(X, gram, h, stride);
  }
  __syncthreads();
  if (arguments.minus_gram_plus) {
    load_matrix(static_cast<const Acc*>(arguments.minus_gram_plus) + matrix * size, h, stride, false, gram);
    for (int i = threadIdx.x; arguments.gram_minus && i < h * h; i += blockDim.x) {
      const int row = i / h, column = i % h;
      if (row >= column) continue;
      const Acc upper = X[row * stride + column], lower = X[column * stride + row];
      X[row * stride + column] = lower;
      X[column * stride + row] = upper;
    }
    __syncthreads();
    regular = invert(X, h, stride, factors, &pivot[0], &value[0]);
    if (regular) sum -= weigh(X, gram, h, stride);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    Acc whole = 0;
    for (int warp = 0; warp * 32 < static_cast<int>(blockDim.x); ++warp) whole += sums[warp];
    gstore(static_cast<Acc*>(arguments.objective) + place, regular ? whole : static_cast<Acc>(INFINITY));
  }
}

}  // namespace teleport_fast

using namespace teleport_fast;

int64_t tf_cuda_grad_norm_objective_widest(int float64, int64_t shared_limit) {
  int64_t h = 1024;
  for (; h > 0; --h) {
    ObjectivePlan plan{1, 1, h, float64, 0, 0, 0};
    if (tf_cuda_grad_norm_objective_plan(&plan, shared_limit) == 0) break;
  }
  return h;
}

int tf_cuda_grad_norm_objective_plan(ObjectivePlan* plan, int64_t shared_limit) {
  const int64_t h = plan->h, size = plan->float64 ? 8 : 4, tiles = ceil_div(h, 4) * ceil_div(h, 4);
  if (plan->candidates < 0 || plan->matrices < 0 || h < 0 || h > 1024) return -1;
  if (plan->matrices > 0 && plan->candidates > INT32_MAX / plan->matrices) return -1;
  plan->stride = ceil_div(h, 4) * 4 + 4;
  plan->threads = tiles > kMostThreads ? kMostThreads : tiles > 0 ? ceil_div(tiles, 32) * 32 : 32;
  plan->shared_bytes = (2 * h * plan->stride + h) * size;
  // Beside it lie the few static values.
  return plan->shared_bytes + 128 > shared_limit ? -1 : 0;
}

cudaError_t tf_cuda_grad_norm_objective(const ObjectivePlan* plan, const void* g, const void* minus_gram_plus,
                                        const void* gram_minus, void* objective, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(plan->candidates * plan->matrices);
  if (grid == 0) return cudaSuccess;
  const ObjectiveArguments arguments{plan->matrices,  plan->candidates, static_cast<int32_t>(plan->h),
                                     static_cast<int32_t>(plan->stride), g, minus_gram_plus, gram_minus, objective};
  const unsigned threads = static_cast<unsigned>(plan->threads);
  const size_t shared = static_cast<size_t>(plan->shared_bytes);
  if (plan->float64) return TF_LAUNCH(grad_norm_objective_kernel<double>, grid, threads, shared, stream, arguments);
  return TF_LAUNCH(grad_norm_objective_kernel<float>, grid, threads, shared, stream, arguments);
}
