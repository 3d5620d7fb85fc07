// exp(M), and exp(−M) with it, of a batch of small matrices: scaling, a Taylor polynomial of degree 8, squaring.
//
// Moves M once in and each exponential once out: the minimum. Each matrix scales by its own norm, found in the kernel, so
// that nothing is read back by the host.
// Launch: a thread per 4 × 4 tile; about 128 threads of small matrices share a block of up to 256, and a block runs as many
// squarings as its largest norm asks for. Four matrices lie in shared memory, products in registers.
// Products: 3 and one per squaring, 5 and two for the pair, whose A² is shared. Squaring e^A − 1 as Y² + 2Y keeps digits
// that 1 + Y rounds off, as long as e^A is near 1.
// Loses to plain torch for a few matrices of h near 64, where one block works while the device's others idle.
// Degree 8 in 3 products: Bader, Blanes, Casas, "Computing the matrix exponential with an optimized Taylor polynomial
// approximation", Mathematics 7 (2019) 1174; the norms up to which it serves are those of csrc/cpu/matrix_exp_kernel.cpp.
#include "matrix_exp.h"

#include "device.h"

namespace teleport_fast {

constexpr int kMostThreads = 256;
constexpr int kSharedThreads = 128;
constexpr double kNearOne = 0.5;

struct ExpArguments {
  int64_t batch;
  int32_t h, stride, tiles, per_block;
  const void* matrices;
  void *plus, *minus;
};

// The norm up to which the polynomial's backward error stays within the unit roundoff.
template <class Acc>
constexpr double kLargestNorm = sizeof(Acc) == 8 ? 0.04991 : 0.5801;

// One matrix's place in shared memory: rows of `stride` values, zeros behind h.
template <class Acc>
struct Buffers {
  Shared<Acc> *A, *A2, *left, *right;
};

template <class Acc>
using Tile = Acc[4][4];

// The thread's tile of a · b.
template <class Acc>
__device__ __forceinline__ void multiply(const Shared<Acc>* a, const Shared<Acc>* b, int padded, int stride, int row,
                                         int column, Tile<Acc>& out) {
  TF_UNROLL
  for (int i = 0; i < 16; ++i) out[i / 4][i % 4] = 0;
  TF_NO_UNROLL
  for (int k = 0; k < padded; k += 4) {
    Pack<Acc, 4> left[4];
    TF_UNROLL
    for (int i = 0; i < 4; ++i) left[i] = sload<4>(a + (row + i) * stride + k);
    TF_UNROLL
    for (int u = 0; u < 4; ++u) {
      const Pack<Acc, 4> right = sload<4>(b + (k + u) * stride + column);
      TF_UNROLL
      for (int i = 0; i < 16; ++i) out[i / 4][i % 4] += left[i / 4].v[u] * right.v[i % 4];
    }
  }
}

// out = f(x0, x1, x2) entry by entry on the thread's own tile, with `diagonal` added on the matrix's diagonal.
template <class Acc>
__device__ __forceinline__ void combine(const Shared<Acc>* x0, const Shared<Acc>* x1, const Shared<Acc>* x2, Acc f0, Acc f1,
                                        Acc f2, Acc diagonal, int h, int stride, int row, int column, Shared<Acc>* out) {
  TF_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int at = (row + i) * stride + column;
    const Pack<Acc, 4> a = sload<4>(x0 + at), b = sload<4>(x1 + at), c = sload<4>(x2 + at);
    Pack<Acc, 4> result;
    TF_UNROLL
    for (int j = 0; j < 4; ++j) {
      result.v[j] = f0 * a.v[j] + (f1 * b.v[j] + f2 * c.v[j]);
      if (row + i == column + j && row + i < h) result.v[j] += diagonal;
    }
    sstore<4>(out + at, result);
  }
}

template <class Acc>
__device__ __forceinline__ void store_tile(const Tile<Acc>& tile, int stride, int row, int column, Shared<Acc>* out) {
  TF_UNROLL
  for (int i = 0; i < 4; ++i) {
    sstore<4>(out + (row + i) * stride + column, Pack<Acc, 4>{tile[i][0], tile[i][1], tile[i][2], tile[i][3]});
  }
}

// The largest column sum of |A|, NaN where an entry is NaN or infinite; the columns' sums pass through `sums`.
template <class Acc>
__device__ __forceinline__ double norm_of(const Shared<Acc>* A, int h, int stride, int tile, int tiles, bool works,
                                          Shared<Acc>* sums) {
  for (int column = tile; works && column < h; column += tiles) {
    Acc sum = 0;
    for (int row = 0; row < h; ++row) sum += fabs(Acc(A[row * stride + column]));
    sums[column] = sum;
  }
  __syncthreads();
  Acc largest = 0, all = 0;
  for (int column = 0; works && column < h; ++column) {
    const Acc sum = sums[column];
    largest = sum > largest ? sum : largest;
    all += sum - sum;
  }
  return static_cast<double>(all == 0 ? largest : all);
}

// left = e^(sign A), whole; `times` and `norm` belong to the thread's matrix, all threads of the block come along.
template <class Acc>
__device__ void exponential(const Buffers<Acc>& x, Acc sign, int times, double norm, int h, int stride, int row, int column,
                            bool works) {
  constexpr double r = 13.304134695650071, x3 = 2.0 / 3;  // r = √177
  constexpr Acc f1 = Acc(x3 * (1 + r) / 88), f2 = Acc(x3 * (1 + r) / 352), low2 = Acc((857 - 58 * r) / 630);
  constexpr Acc r0 = Acc((29 * r - 271) / (315 * x3)), r1 = Acc(11 * (r - 1) / (1260 * x3));
  constexpr Acc r2 = Acc(11 * (r - 9) / (5040 * x3)), r4 = Acc((89 - r) / (5040 * x3 * x3));
  const int padded = stride - 4;
  Tile<Acc> product;
  if (works) combine<Acc>(x.A, x.A2, x.A2, sign * f1, f2, 0, 0, h, stride, row, column, x.left);
  __syncthreads();
  if (works) multiply(x.A2, x.left, padded, stride, row, column, product);
  __syncthreads();
  if (works) {
    store_tile(product, stride, row, column, x.left);
    combine<Acc>(x.A, x.A2, x.left, sign * r1, r2, r4, r0, h, stride, row, column, x.right);
    combine<Acc>(x.A2, x.left, x.left, Acc(x3), 1, 0, 0, h, stride, row, column, x.left);
  }
  __syncthreads();
  if (works) multiply(x.left, x.right, padded, stride, row, column, product);
  __syncthreads();
  if (works) {
    store_tile(product, stride, row, column, x.left);
    combine<Acc>(x.A, x.A2, x.left, sign, low2, 1, 0, h, stride, row, column, x.left);
  }
  const bool valid = norm - norm == 0;
  bool reduced = true;
  for (int t = 0; __syncthreads_or(works && t < times); ++t, norm *= 2) {
    const bool goes = works && t < times;
    if (goes && reduced && norm > kNearOne) {
      reduced = false;
      combine<Acc>(x.left, x.left, x.left, 1, 0, 0, 1, h, stride, row, column, x.left);
    }
    __syncthreads();
    if (goes) multiply(x.left, x.left, padded, stride, row, column, product);
    __syncthreads();
    if (!goes) continue;
    TF_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Pack<Acc, 4> y = sload<4>(x.left + (row + i) * stride + column);
      TF_UNROLL
      for (int j = 0; j < 4; ++j) product[i][j] += (reduced ? Acc(2) : Acc(0)) * y.v[j];
    }
    store_tile(product, stride, row, column, x.left);
  }
  if (works && reduced) combine<Acc>(x.left, x.left, x.left, 1, 0, 0, 1, h, stride, row, column, x.left);
  if (works && !valid) combine<Acc>(x.left, x.left, x.left, static_cast<Acc>(NAN), 0, 0, 0, h, stride, row, column, x.left);
  __syncthreads();
}

// A block's matrices are one run of memory, taken by neighbouring threads: a tile's own thread would skip from row to row.
template <class Acc>
__device__ __forceinline__ void write(const Shared<Acc>* first, int count, int each, int h, int stride, Acc* out) {
  for (int i = threadIdx.x; i < count * h * h; i += blockDim.x) {
    const int at = i % (h * h);
    gstore(out + i, Acc(first[i / (h * h) * each + at / h * stride + at % h]));
  }
}

template <class Acc>
__global__ void __launch_bounds__(kMostThreads) matrix_exp_kernel(ExpArguments arguments) {
  DYNAMIC_SHARED(memory);
  const int h = arguments.h, stride = arguments.stride, tiles = arguments.tiles, padded = stride - 4;
  const int local = threadIdx.x / tiles, tile = threadIdx.x % tiles, side = padded / 4;
  const int64_t size = static_cast<int64_t>(h) * h;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * arguments.per_block, left = arguments.batch - first;
  const int count = static_cast<int>(left < arguments.per_block ? left : arguments.per_block);
  const bool works = local < count;
  const Acc* from = static_cast<const Acc*>(arguments.matrices) + first * size;
  Acc *plus = static_cast<Acc*>(arguments.plus) + first * size, *minus = static_cast<Acc*>(arguments.minus);
  if (h == 1) {
    if (!works) return;
    const Acc x = gload(from + local);
    gstore(plus + local, x - x == 0 ? exp(x) : static_cast<Acc>(NAN));
    if (minus) gstore(minus + first + local, x - x == 0 ? exp(-x) : static_cast<Acc>(NAN));
    return;
  }
  // A matrix of padded × stride values, four for each matrix, and a row of sums.
  const int place = padded * stride;
  const int each = 4 * place + padded;
  Shared<Acc>* all = reinterpret_cast<Shared<Acc>*>(memory);
  Shared<Acc>* own = all + local * each;
  const Buffers<Acc> x{own, own + place, own + 2 * place, own + 3 * place};
  const int row = tile / side * 4, column = tile % side * 4;

  for (int i = tile; works && i < padded * padded; i += tiles) {
    const int r = i / padded, c = i % padded;
    if (r >= h || c >= h) x.A[r * stride + c] = 0;
  }
  for (int i = threadIdx.x; i < count * h * h; i += blockDim.x) {
    const int at = i % (h * h);
    all[i / (h * h) * each + at / h * stride + at % h] = gload(from + i);
  }
  __syncthreads();
  double norm = norm_of<Acc>(x.A, h, stride, tile, tiles, works, own + 4 * place);
  const bool valid = norm - norm == 0;
  int times = 0;
  Acc scale = 1;
  for (; valid && norm > kLargestNorm<Acc>; norm /= 2) ++times, scale /= 2;
  if (works) combine<Acc>(x.A, x.A, x.A, scale, 0, 0, 0, h, stride, row, column, x.A);
  __syncthreads();
  Tile<Acc> square;
  if (works) {
    multiply(x.A, x.A, padded, stride, row, column, square);
    store_tile(square, stride, row, column, x.A2);
  }
  exponential<Acc>(x, 1, times, norm, h, stride, row, column, works);
  write<Acc>(all + 2 * place, count, each, h, stride, plus);
  if (!minus) return;
  __syncthreads();
  exponential<Acc>(x, -1, times, norm, h, stride, row, column, works);
  write<Acc>(all + 2 * place, count, each, h, stride, minus + first * size);
}

}  // namespace teleport_fast

using namespace teleport_fast;

int64_t tf_cuda_matrix_exp_widest(int float64, int64_t shared_limit) {
  int64_t h = 64;
  for (; h > 0; --h) {
    ExpPlan plan{1, h, float64, 0, 0, 0, 0, 0};
    if (tf_cuda_matrix_exp_plan(&plan, shared_limit) == 0) break;
  }
  return h;
}

int tf_cuda_matrix_exp_plan(ExpPlan* plan, int64_t shared_limit) {
  const int64_t h = plan->h, size = plan->float64 ? 8 : 4, padded = ceil_div(h, 4) * 4;
  if (plan->batch < 0 || h < 0 || h > 64) return -1;
  if (h == 0) return 0;
  plan->stride = padded + 4;
  plan->tiles = padded / 4 * (padded / 4);
  plan->per_block = plan->tiles < kSharedThreads ? kSharedThreads / plan->tiles : 1;
  const int64_t each = h == 1 ? 0 : (4 * padded * plan->stride + padded) * size;
  while (plan->per_block > 1 && plan->per_block * each > (48 << 10)) --plan->per_block;
  plan->threads = ceil_div(plan->per_block * plan->tiles, 32) * 32;
  plan->shared_bytes = plan->per_block * each;
  return plan->shared_bytes > shared_limit || ceil_div(plan->batch, plan->per_block) > INT32_MAX ? -1 : 0;
}

cudaError_t tf_cuda_matrix_exp(const ExpPlan* plan, const void* matrices, void* plus, void* minus, cudaStream_t stream) {
  if (plan->batch == 0 || plan->h == 0) return cudaSuccess;
  const ExpArguments arguments{plan->batch,
                               static_cast<int32_t>(plan->h),
                               static_cast<int32_t>(plan->stride),
                               static_cast<int32_t>(plan->tiles),
                               static_cast<int32_t>(plan->per_block),
                               matrices,
                               plus,
                               minus};
  const unsigned grid = static_cast<unsigned>(ceil_div(plan->batch, plan->per_block));
  const unsigned threads = static_cast<unsigned>(plan->threads);
  const size_t shared = static_cast<size_t>(plan->shared_bytes);
  if (plan->float64) return TF_LAUNCH(matrix_exp_kernel<double>, grid, threads, shared, stream, arguments);
  return TF_LAUNCH(matrix_exp_kernel<float>, grid, threads, shared, stream, arguments);
}
