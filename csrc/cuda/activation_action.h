// σ⁻¹(g σ(Z)) and (M σ(Z)) / σ'(Z) for LeakyReLU and PReLU, one batched product with both ends fused: the host side.
#pragma once
#include "compat.h"
#include "view.h"

extern "C" {
// Z: (batch, h, B) as heads, rows and inner, on the host, any strides. matrix: (h, h) contiguous per batch, matrix_step
// entries apart, 0 where all share one; slope: (h,); both float32, or float64 for float64. out: (batch, h, B) contiguous,
// of Z's storage. tangent: divide by σ'(Z) where the action divides by σ'(σ⁻¹(g σ(Z))).
// 1 (cudaErrorInvalidValue) if a size or the storage is out of range. All other pointers on the device.
cudaError_t tf_cuda_activation_action(const teleport_fast::View* Z, const void* matrix, int64_t matrix_step,
                                      const void* slope, void* out, int tangent, cudaStream_t stream);
}
