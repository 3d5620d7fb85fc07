// The only header a kernel includes for the machine: CUDA's names under nvcc, the tests' CPU emulator under g++.
//
// Kernels launch through TF_LAUNCH, take shared memory through SHARED_ARRAY and DYNAMIC_SHARED with elements Shared<T>,
// and touch global memory through gload and gstore. Under nvcc these are plain accesses; under the emulator each one is
// checked and counted (tests/cuda_on_cpu).
#pragma once
#ifdef TELEPORT_FAST_CUDA_HOST
// launch.cpp is plain C++ and wants the types of a launch only.
#include <cuda_runtime_api.h>
#else
#include <math.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace teleport_fast {

// N neighbouring values that move as one access of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

}  // namespace teleport_fast

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace teleport_fast {

using bf16 = __nv_bfloat16;
using fp16 = __half;
template <class T>
using Shared = T;

#define SHARED_ARRAY(type, name, dims) __shared__ type name dims
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define TF_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::teleport_fast::launch(kernel, grid, block, shared, stream, __VA_ARGS__)
#define TF_UNROLL _Pragma("unroll")
#define TF_NO_UNROLL _Pragma("unroll 1")
#define TF_PRAGMA(text) _Pragma(#text)
#define TF_UNROLL_BY(n) TF_PRAGMA(unroll n)
// The block's barrier for warps with different tasks, which come to it from different lines.
#define TASK_BARRIER() asm volatile("barrier.sync 0;" ::: "memory")

// More than 48 KiB of dynamic shared memory must be asked for, kernel by kernel.
template <class Kernel, class... Arguments>
cudaError_t launch(Kernel* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Arguments... arguments) {
  if (shared > (48 << 10)) {
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

template <class T>
__device__ __forceinline__ T gload(const T* address) {
  return *address;
}
template <class T>
__device__ __forceinline__ void gstore(T* address, T value) {
  *address = value;
}
template <int N, class T>
__device__ __forceinline__ Pack<T, N> sload(const T* address) {
  return *reinterpret_cast<const Pack<T, N>*>(address);
}
template <int N, class T>
__device__ __forceinline__ void sstore(T* address, Pack<T, N> value) {
  *reinterpret_cast<Pack<T, N>*>(address) = value;
}
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
__device__ __forceinline__ bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ fp16 to_fp16(float x) { return __float2half_rn(x); }

}  // namespace teleport_fast
#else
#include "emulator.h"

namespace teleport_fast {

#define SHARED_ARRAY(element, name, dims)             \
  using name##_array = emu::ArrayOf<element dims>;    \
  static char name##_tag;                             \
  auto& name = *static_cast<typename name##_array::type*>( \
      emu::static_array(&name##_tag, sizeof(typename name##_array::type)))
#define DYNAMIC_SHARED(name) unsigned char* name = emu::shared_memory
#define TF_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), ::teleport_fast::launch(#kernel, kernel, grid, block, shared, __VA_ARGS__))
#define TF_UNROLL
#define TF_NO_UNROLL
#define TF_UNROLL_BY(n)
#define TASK_BARRIER() ((void)emu::arrive(emu::block_barrier, emu::thread_count, "TASK_BARRIER", 0))

template <class Kernel, class... Arguments>
cudaError_t launch(const char* name, Kernel* kernel, dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  return emu::launch(name, grid, block, shared, [=] { kernel(arguments...); });
}

template <class T>
T gload(const T* address, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  emu::access(reinterpret_cast<uintptr_t>(address), sizeof(T), alignof(T), false, file, line);
  return *address;
}
template <class T>
void gstore(T* address, T value, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  emu::access(reinterpret_cast<uintptr_t>(address), sizeof(T), alignof(T), true, file, line);
  *address = value;
}
template <int N, class T>
Pack<T, N> sload(const Shared<T>* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Pack<T, N>)) emu::fail("misaligned pack in shared memory");
  Pack<T, N> result;
  for (int i = 0; i < N; ++i) result.v[i] = address[i];
  return result;
}
template <int N, class T>
void sstore(Shared<T>* address, Pack<T, N> value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Pack<T, N>)) emu::fail("misaligned pack in shared memory");
  for (int i = 0; i < N; ++i) address[i] = value.v[i];
}

}  // namespace teleport_fast
#endif

namespace teleport_fast {

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

// Storage to accumulator and back; float64 accumulates in float64, all else in float32.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return to_float(x); }
__device__ __forceinline__ float widen(fp16 x) { return to_float(x); }
template <class T>
__device__ __forceinline__ T narrow(typename AccumulatorOf<T>::type x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return to_bf16(x);
  } else if constexpr (std::is_same_v<T, fp16>) {
    return to_fp16(x);
  } else {
    return x;
  }
}

}  // namespace teleport_fast
#endif  // TELEPORT_FAST_CUDA_HOST
