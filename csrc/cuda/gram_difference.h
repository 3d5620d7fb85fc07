// D = S₋ − S₊ and J = tr S₊ + tr S₋ for a bucket of equal joints: the host side.
#pragma once
#include "compat.h"
#include "view.h"

namespace teleport_fast {

// The caller fills in the first two lines; the planner the rest.
struct GramPlan {
  int32_t joints, heads, h, plus, minus;  // plus, minus: views of one joint
  int32_t float64, keep_partials;         // keep_partials: stop before the splits are added up, for covariance_
  int32_t splits, micro, side, pairs, groups, multipliers, threads;
  int64_t shared_bytes, partials;  // partials: accumulators of workspace
};

}  // namespace teleport_fast

extern "C" {
// The largest h that the planner takes where a block may have so many bytes of shared memory.
int64_t tf_cuda_gram_difference_widest(int float64, int64_t shared_limit);
// views: joint-major, each joint's plus views first. wanted_blocks: about twice the device's multiprocessors.
// -1 if sizes disagree, storages mix float64 with others, or h is over 256 (float64: 128), or what it needs
// exceeds shared_limit, the bytes of shared memory that a block may have (h over 248 on 163 KiB): then the BLAS must do.
int tf_cuda_gram_difference_plan(teleport_fast::View* views, teleport_fast::GramPlan* plan, int64_t wanted_blocks,
                                 int64_t shared_limit);
// All pointers on the device. d: (joints · heads, h, h), trace: (joints · heads), float32 or float64 as plan->float64 says.
cudaError_t tf_cuda_gram_difference(const teleport_fast::View* views, const teleport_fast::GramPlan* plan, void* workspace,
                                    void* d, void* trace, cudaStream_t stream);
}
