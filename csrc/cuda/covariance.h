// C ← β C + (1 − β) Σ G Gᵀ / ‖G‖² over the tensors of a bucket of equal joints: the host side.
#pragma once
#include "gram_difference.h"

extern "C" {
// plan: joints is the number of views, plus 0, minus 1; heads, h and float64 as ever. The rest as for gram_difference.
int tf_cuda_covariance_plan(teleport_fast::View* views, teleport_fast::GramPlan* plan, int64_t wanted_blocks,
                            int64_t shared_limit);
// views: joint-major, plan->joints / joints each. covariance: (joints · heads, h, h), float32 or float64. A view whose
// ‖G‖² is zero or not finite adds nothing. workspace: plan->partials accumulators.
cudaError_t tf_cuda_covariance_(const teleport_fast::View* views, const teleport_fast::GramPlan* plan, int64_t joints,
                                double decay, void* workspace, void* covariance, cudaStream_t stream);
}
