// Kernels with planted faults, and one without, that prove the emulator: each fault must be told, the sound one run.
#include "../../csrc/cuda/compat.h"

namespace teleport_fast {

// Reverses each block's 64 values; kBarrier says whether the threads wait for one another before they read.
template <bool kBarrier, class Element>
__global__ void reverse_kernel(const float* in, float* out, int n) {
  SHARED_ARRAY(Element, values, [64]);
  const int at = blockIdx.x * 64 + threadIdx.x;
  values[threadIdx.x] = at < n ? gload(in + at) : 0.0f;
  if constexpr (kBarrier) __syncthreads();
  if (at < n) gstore(out + at, static_cast<float>(values[63 - threadIdx.x]));
}

__global__ void unwritten_kernel(const float* in, float* out, int n) {
  SHARED_ARRAY(Shared<float>, values, [64]);
  if (threadIdx.x < 63) values[threadIdx.x] = gload(in + threadIdx.x);
  __syncthreads();
  gstore(out + threadIdx.x, n > 0 ? static_cast<float>(values[63 - threadIdx.x]) : 0.0f);
}

__global__ void divergent_kernel(const float* in, float* out, int n) {
  if (static_cast<int>(threadIdx.x) < n / 2) __syncthreads();
  gstore(out + threadIdx.x, gload(in + threadIdx.x));
}

__global__ void two_barriers_kernel(const float* in, float* out, int n) {
  if (static_cast<int>(threadIdx.x) < n / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  gstore(out + threadIdx.x, gload(in + threadIdx.x));
}

__global__ void out_of_bounds_kernel(const float* in, float* out, int n) {
  gstore(out + threadIdx.x, gload(in + threadIdx.x + (static_cast<int>(threadIdx.x) == n - 1)));
}

__global__ void store_into_input_kernel(float* in, float* out, int) { gstore(in + threadIdx.x, gload(out + threadIdx.x)); }

// Sums 64 values by shuffles, counts the positive ones by votes, and reads them with a stride to be counted.
__global__ void warp_kernel(const float* in, float* out, int stride) {
  const float value = gload(in + threadIdx.x * stride);
  float sum = value;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
  SHARED_ARRAY(Shared<float>, sums, [2]);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  const int positive = __syncthreads_count(value > 0);
  const float whole = static_cast<float>(sums[0]) + static_cast<float>(sums[1]);
  const unsigned ballot = __ballot_sync(0xffffffffu, value > 0);
  const float first = __shfl_sync(0xffffffffu, value, 0), before = __shfl_up_sync(0xffffffffu, value, 1);
  if (threadIdx.x == 40) {
    gstore(out, whole);
    gstore(out + 1, static_cast<float>(positive));
    gstore(out + 2, static_cast<float>(__builtin_popcount(ballot)));
    gstore(out + 3, first);
    gstore(out + 4, before);
  }
}

// Exchanges neighbours within each warp through shared memory; __syncwarp is all the order this needs.
template <bool kBarrier>
__global__ void warp_swap_kernel(const float* in, float* out, int) {
  SHARED_ARRAY(Shared<float>, values, [64]);
  values[threadIdx.x] = gload(in + threadIdx.x);
  if constexpr (kBarrier) __syncwarp();
  gstore(out + threadIdx.x, static_cast<float>(values[threadIdx.x ^ 1]));
}

}  // namespace teleport_fast

using namespace teleport_fast;

extern "C" {
int planted(const char* name, float* in, float* out, int n) {
  const int blocks = (n + 63) / 64;
  auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  auto run = [&](auto* kernel, int grid) { return TF_LAUNCH(kernel, grid, 64, 0, nullptr, in, out, n); };
  if (is("sound")) return run(reverse_kernel<true, Shared<float>>, blocks);
  if (is("race")) return run(reverse_kernel<false, Shared<float>>, blocks);
  if (is("unchecked race")) return run(reverse_kernel<false, float>, blocks);
  if (is("unwritten")) return run(unwritten_kernel, 1);
  if (is("divergent")) return run(divergent_kernel, 1);
  if (is("two barriers")) return run(two_barriers_kernel, 1);
  if (is("out of bounds")) return run(out_of_bounds_kernel, 1);
  if (is("store into input")) return run(store_into_input_kernel, 1);
  if (is("warp")) return run(warp_kernel, 1);
  if (is("warp swap")) return run(warp_swap_kernel<true>, 1);
  if (is("warp race")) return run(warp_swap_kernel<false>, 1);
  return -1;
}
// Rounds through bf16 and fp16, for comparison with torch's own rounding of the same bits.
void planted_round(const float* in, float* as_bf16, float* as_fp16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    as_bf16[i] = to_float(to_bf16(in[i]));
    as_fp16[i] = to_float(to_fp16(in[i]));
  }
}
}
