// A → g A in place on any number of strided head views in one launch: the host side.
#pragma once
#include "compat.h"
#include "view.h"

namespace teleport_fast {

// The rows of one view, multiplied by its heads' matrices: (heads, h, h) contiguous, float32, or float64 for float64 views.
struct ActedView {
  View view;
  const void* matrix;
};

// How the kernel cuts h rows: filled in by the planner.
struct GroupActionPlan {
  int32_t h, row_groups, column_groups, width, swizzle, matrix_stride, slice, float64;
  int64_t tiles, shared_bytes;
};

}  // namespace teleport_fast

extern "C" {
// The largest h that the planner takes.
int64_t tf_cuda_group_action_widest(int float64);
// Plus views and minus views alike: parameters, gradients and momenta of a bucket, each with g or g⁻ᵀ of its joint.
// wanted_blocks: about four times the device's multiprocessors. owners: plan->tiles int32, null to count only.
// -1 if heads have different h, storages mix float64 with others, or h is over widest.
int tf_cuda_group_action_plan(teleport_fast::ActedView* views, int64_t count, int64_t wanted_blocks, int32_t* owners,
                              teleport_fast::GroupActionPlan* plan);
cudaError_t tf_cuda_group_action_(const teleport_fast::ActedView* views, const int32_t* owners,
                                  const teleport_fast::GroupActionPlan* plan, cudaStream_t stream);
}
