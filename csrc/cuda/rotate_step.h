// An optimizer's step in a turned basis and back, in place on a bucket of equal shapes: the host side.
#pragma once
#include "compat.h"
#include "view.h"

namespace teleport_fast {

enum RotateBase : int32_t { kAdam = 0, kSign = 1, kRowNorm = 2 };

// What a launch does: the whole step; the part in the turned basis, U written plainly over the parameter's operand; or the
// update p ← keep p − rate · gradient alone. The latter two stand between and behind the BLAS's turns.
enum RotatePart : int32_t { kWholeStep = 0, kTurnedPart = 1, kUpdate = 2 };

// One parameter with its gradient (read only) and moments; without a second moment views[3] repeats the first.
struct RotateView {
  View views[4];
  const void* bases[2];  // left (heads, h, h) and right (n, n), contiguous: float64 for float64 views, else float32
};

// The caller fills in the first line; the planner the rest.
struct RotatePlan {
  int32_t left, right, base, part, float64;    // left, right: whether there are bases
  int32_t fused_left, fused_right;             // turns that fit the kernel; the caller does the others, then plans anew
  int32_t heads, rows, columns, panel_rows, row_groups, column_groups, width, panels, row_blocks, splits, run, whole_rows, resume;
  int32_t tiles;                    // of one entry
  int64_t shared_bytes, workspace;  // workspace: accumulators
};

// step counts this step, from 1; nesterov is 0 or 1.
struct RotateStep {
  double step, lr, beta1, beta2, eps, weight_decay, nesterov;
};

}  // namespace teleport_fast

extern "C" {
// Prepares descriptors on the host; -1 if sizes disagree or are out of range, or storages mix float64 with others. Where
// fused_left or fused_right comes out less than left or right, the launch would leave that turn out.
// wanted_blocks: about four times the device's multiprocessors. shared_limit: bytes that a block may have.
int tf_cuda_rotate_step_plan(teleport_fast::RotateView* views, int64_t count, int64_t wanted_blocks, int64_t shared_limit,
                             teleport_fast::RotatePlan* plan);
// Views on the device, plan and step on the host. No two views may share an entry, but for a gradient that is the
// parameter's operand itself.
cudaError_t tf_cuda_rotate_step_(const teleport_fast::RotateView* views, int64_t count, const teleport_fast::RotatePlan* plan,
                                 const teleport_fast::RotateStep* step, void* workspace, cudaStream_t stream);
}
