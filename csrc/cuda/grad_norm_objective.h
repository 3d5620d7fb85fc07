// J = tr(P⁻¹S₊) + tr(P S₋), P = gᵀ g, for many candidates g of every joint and head in one launch: the host side.
#pragma once
#include "compat.h"
#include "view.h"

namespace teleport_fast {

// The caller fills in the first line; the planner the rest.
struct ObjectivePlan {
  int64_t candidates, matrices, h, float64;  // matrices: joints · heads
  int64_t stride, threads, shared_bytes;
};

}  // namespace teleport_fast

extern "C" {
// The largest h that the planner takes where a block may have so many bytes of shared memory.
int64_t tf_cuda_grad_norm_objective_widest(int float64, int64_t shared_limit);
// -1 if two padded h × h matrices exceed shared_limit, the bytes of shared memory that a block may have (163 KiB: h over 140,
// float64 over 99), or the launch has too many blocks.
int tf_cuda_grad_norm_objective_plan(teleport_fast::ObjectivePlan* plan, int64_t shared_limit);
// All pointers on the device, float32, or float64 as plan->float64 says. g: (candidates, matrices, h, h) contiguous.
// minus_gram_plus = −S₊ and gram_minus = S₋, as gram_difference leaves them for one side alone: (matrices, h, h)
// contiguous, symmetric, null where that side is empty. objective: (candidates, matrices); inf where g is singular.
cudaError_t tf_cuda_grad_norm_objective(const teleport_fast::ObjectivePlan* plan, const void* g,
                                        const void* minus_gram_plus, const void* gram_minus, void* objective,
                                        cudaStream_t stream);
}
