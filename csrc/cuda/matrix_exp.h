// exp(M), and exp(−M) with it, for a batch of small matrices in one launch without a word to the host: the host side.
#pragma once
#include "compat.h"
#include "view.h"

namespace teleport_fast {

// The caller fills in the first line; the planner the rest.
struct ExpPlan {
  int64_t batch, h, float64;
  int64_t stride, tiles, per_block, threads, shared_bytes;
};

}  // namespace teleport_fast

extern "C" {
// The largest h that the planner takes where a block may have so many bytes of shared memory.
int64_t tf_cuda_matrix_exp_widest(int float64, int64_t shared_limit);
// -1 if h is over 64, if four padded matrices exceed shared_limit, the bytes of shared memory that a block may have (h = 64:
// 69 KiB, float64 137 KiB), or the launch has too many blocks.
int tf_cuda_matrix_exp_plan(teleport_fast::ExpPlan* plan, int64_t shared_limit);
// All pointers on the device, (batch, h, h) contiguous, float32, or float64 as plan->float64 says; minus may be null.
// A matrix that holds a NaN or an infinity gives NaN.
cudaError_t tf_cuda_matrix_exp(const teleport_fast::ExpPlan* plan, const void* matrices, void* plus, void* minus,
                               cudaStream_t stream);
}
