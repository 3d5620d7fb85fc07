// A diagonal move and an AdamW step in place on any number of strided views in one launch: the host side.
#pragma once
#include "compat.h"
#include "view.h"

namespace teleport_fast {

// One parameter with its gradient (read only) and both moments. Strides of the latter three: head, row, outer, inner.
struct AdamwView {
  View view;  // the parameter's
  void* others[3];
  int64_t strides[3][4];
  const void *parameter_factors, *gradient_factors;  // of heads · h rows: float64 for float64 views, else float32
  double shift;
  int64_t alike;  // the planner's: all four have the parameter's strides
};

// step counts this step, from 1.
struct AdamwStep {
  double step, lr, beta1, beta2, eps, weight_decay;
};

}  // namespace teleport_fast

extern "C" {
// Prepares descriptors on the host; answers the number of tiles (int32 owners), or -1 if a size or a storage is out of range.
// owners may be null to count only. One launch takes float64 views only, or none. No two views may share an entry.
int64_t tf_cuda_teleport_adamw_plan(teleport_fast::AdamwView* views, int64_t count, int32_t* owners);
// Views and owners on the device, step on the host. float64: so are the views.
cudaError_t tf_cuda_teleport_adamw_(const teleport_fast::AdamwView* views, const int32_t* owners, int64_t tiles,
                                    const teleport_fast::AdamwStep* step, int float64, cudaStream_t stream);
}
