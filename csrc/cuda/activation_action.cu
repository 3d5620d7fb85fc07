// σ⁻¹(g σ(Z)) and its tangent: a batched product that activates Z's tiles as they arrive and divides the sums as they leave.
//
// Moves Z once per 64 rows of the result and g once per 128 columns, from L2 where neighbouring blocks meet; the result once.
// Launch: 256 threads make 64 rows × 128 columns of one batch, 8 × 4 sums each; blocks of rows of the same columns are
// neighbours. A thread's columns lie 32 apart, so that a warp stores whole rows of sectors whatever the alignment.
// Loses to the BLAS with two passes beside it on wide half-type layers, where tensor cores would pay: kernels/ has those.
#include "activation_action.h"

#include "device.h"

namespace teleport_fast {

constexpr int kThreads = 256;
constexpr int kRows = 8, kColumns = 4;  // results per thread
constexpr int kHigh = 64, kWide = 128, kDepth = 16;
constexpr int kSliceStride = kHigh + 4, kPanelStride = kWide + 4;

struct ActivationArguments {
  View Z;
  const void *matrix, *slope;
  void* out;
  int64_t matrix_step;
  int32_t row_blocks, column_blocks, tangent;
};

// g's rows row0 … + 64, columns first … + 16, transposed; zeros outside. Lanes take 16 columns × 2 rows: whole sectors.
template <class Acc>
__device__ __forceinline__ void load_slice(const Acc* matrix, int h, int row0, int first, Shared<Acc>* slice) {
  TF_UNROLL
  for (int i = threadIdx.x; i < kHigh * kDepth; i += kThreads) {
    const int k = i % kDepth, row = i / kDepth;
    const bool inside = row0 + row < h && first + k < h;
    slice[k * kSliceStride + row] = inside ? gload(matrix + int64_t{row0 + row} * h + first + k) : Acc(0);
  }
}

// σ(Z) of rows first … + 16 and columns column0 … + 128; zeros outside. Lanes run along the axis that is fast in memory.
template <class S, class Acc>
__device__ __forceinline__ void load_panel(const View& Z, const S* data, const Acc* slope, int first, int64_t column0,
                                           Shared<Acc>* panel) {
  TF_UNROLL
  for (int i = threadIdx.x; i < kDepth * kWide; i += kThreads) {
    const int k = Z.rows_fast ? i % kDepth : i / kWide, column = Z.rows_fast ? i / kDepth : i % kWide;
    Acc z = 0;
    if (first + k < Z.rows && column0 + column < Z.inner) {
      z = widen(gload(data + (first + k) * Z.row_stride + (column0 + column) * Z.inner_stride));
      if (z < 0) z *= gload(slope + first + k);
    }
    panel[k * kPanelStride + column] = z;
  }
}

template <class Acc>
__device__ __forceinline__ void multiply(const Shared<Acc>* slice, const Shared<Acc>* panel, int warp, int lane,
                                         Acc (&sums)[kRows][kColumns]) {
  TF_UNROLL_BY(2)
  for (int k = 0; k < kDepth; ++k) {
    Acc a[kRows], b[kColumns];
    TF_UNROLL
    for (int u = 0; u < kRows; u += 4) {
      const Pack<Acc, 4> quad = sload<4>(slice + k * kSliceStride + warp * kRows + u);
      TF_UNROLL
      for (int i = 0; i < 4; ++i) a[u + i] = quad.v[i];
    }
    TF_UNROLL
    for (int j = 0; j < kColumns; ++j) b[j] = panel[k * kPanelStride + lane + 32 * j];
    TF_UNROLL
    for (int i = 0; i < kRows; ++i) {
      TF_UNROLL
      for (int j = 0; j < kColumns; ++j) sums[i][j] += a[i] * b[j];
    }
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, sizeof(Acc) == 8 ? 1 : 2) activation_action_kernel(ActivationArguments arguments) {
  SHARED_ARRAY(Shared<Acc>, slice, [kDepth * kSliceStride]);
  SHARED_ARRAY(Shared<Acc>, panel, [kDepth * kPanelStride]);
  const View& Z = arguments.Z;
  const int h = Z.rows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int place = blockIdx.x / arguments.row_blocks, head = place / arguments.column_blocks;
  const int row0 = blockIdx.x % arguments.row_blocks * kHigh, mine = row0 + warp * kRows;
  const int64_t column0 = int64_t{place % arguments.column_blocks} * kWide;
  const Acc* matrix = static_cast<const Acc*>(arguments.matrix) + head * arguments.matrix_step;
  const Acc* slope = static_cast<const Acc*>(arguments.slope);

  // Added in runs of 64 rows of Z: one long sum is less accurate than the BLAS's.
  Acc results[kRows][kColumns] = {}, sums[kRows][kColumns] = {};
  uint32_t negative = 0;  // signs of Z where the results will be: bit i · kColumns + j
  TF_NO_UNROLL
  for (int first = 0; first < h; first += kDepth) {
    load_slice(matrix, h, row0, first, slice);
    with_storage<Acc>(Z.storage, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      load_panel<S>(Z, static_cast<const S*>(Z.data) + head * Z.head_stride, slope, first, column0, panel);
    });
    __syncthreads();
    // A thread's 8 rows lie in one panel of 16, whose σ(Z) has Z's signs: Z needs no second read.
    if (arguments.tangent && first <= mine && mine < first + kDepth) {
      TF_UNROLL
      for (int bit = 0; bit < kRows * kColumns; ++bit) {
        const int at = (mine - first + bit / kColumns) * kPanelStride + lane + 32 * (bit % kColumns);
        if (panel[at] < Acc(0)) negative |= 1u << bit;
      }
    }
    multiply(slice, panel, warp, lane, sums);
    if ((first / kDepth) % 4 == 3 || first + kDepth >= h) {
      TF_UNROLL
      for (int bit = 0; bit < kRows * kColumns; ++bit) {
        results[bit / kColumns][bit % kColumns] += sums[bit / kColumns][bit % kColumns];
        sums[bit / kColumns][bit % kColumns] = 0;
      }
    }
    __syncthreads();
  }
  with_storage<Acc>(Z.storage, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* out = static_cast<S*>(arguments.out) + (int64_t{head} * h + mine) * Z.inner + column0;
    TF_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (mine + i >= h) break;
      const Acc a = gload(slope + mine + i);
      TF_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const int column = lane + 32 * j;
        if (column0 + column >= Z.inner) break;
        const Acc y = results[i][j];
        const bool low = arguments.tangent ? negative >> (i * kColumns + j) & 1 : y < 0;
        gstore(out + int64_t{i} * Z.inner + column, narrow<S>(low ? y / a : y));
      }
    }
  });
}

}  // namespace teleport_fast

using namespace teleport_fast;

cudaError_t tf_cuda_activation_action(const View* Z, const void* matrix, int64_t matrix_step, const void* slope, void* out,
                                      int tangent, cudaStream_t stream) {
  ActivationArguments arguments{*Z, matrix, slope, out, matrix_step, 0, 0, tangent};
  View& view = arguments.Z;
  if (!prepare(view, false) || view.outer > 1) return static_cast<cudaError_t>(1);
  if (columns_of(view) == 0 || view.heads == 0 || view.rows == 0) return cudaSuccess;
  arguments.row_blocks = static_cast<int32_t>(ceil_div(view.rows, kHigh));
  arguments.column_blocks = static_cast<int32_t>(ceil_div(view.inner, kWide));
  const int64_t places = int64_t{view.heads} * arguments.column_blocks;
  if (places > INT32_MAX / arguments.row_blocks) return static_cast<cudaError_t>(1);
  const unsigned grid = static_cast<unsigned>(places * arguments.row_blocks);
  if (view.storage == kFloat64) return TF_LAUNCH(activation_action_kernel<double>, grid, kThreads, 0, stream, arguments);
  return TF_LAUNCH(activation_action_kernel<float>, grid, kThreads, 0, stream, arguments);
}
