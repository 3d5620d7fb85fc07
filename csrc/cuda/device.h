// Device helpers that several kernels share: where a column lies, sums over a warp, the tile's place in a view.
#pragma once
#include "compat.h"
#include "view.h"

namespace teleport_fast {

constexpr unsigned kFullWarp = 0xffffffffu;

// The element offset of column first + k, for k < 2^31: one 64-bit division per tile, 32-bit ones after it.
struct Columns {
  int64_t outer_stride, inner_stride, first_outer;
  uint32_t inner, first_inner;
  bool flat;

  __device__ __forceinline__ Columns(const View& view, int64_t first)
      : outer_stride(view.outer_stride),
        inner_stride(view.inner_stride),
        inner(view.inner),
        flat(view.outer == 1) {
    first_outer = flat ? 0 : first / view.inner;
    first_inner = static_cast<uint32_t>(first - first_outer * view.inner);
  }
  __device__ __forceinline__ int64_t offset(uint32_t k) const {
    uint32_t at = first_inner + k;
    if (flat) return at * inner_stride;
    uint32_t outer = at / inner;
    return (first_outer + outer) * outer_stride + (at - outer * inner) * inner_stride;
  }
};

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  TF_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullWarp, value, lanes);
  return value;
}

// Calls body with a null pointer of the view's storage type: float64 in the float64 kernels, one of three in the others.
template <class Acc, class Body>
__device__ __forceinline__ void with_storage(int32_t storage, Body body) {
  if constexpr (std::is_same_v<Acc, double>) {
    body(static_cast<double*>(nullptr));
  } else if (storage == kFloat32) {
    body(static_cast<float*>(nullptr));
  } else if (storage == kBFloat16) {
    body(static_cast<bf16*>(nullptr));
  } else {
    body(static_cast<fp16*>(nullptr));
  }
}

}  // namespace teleport_fast
