// Diagonals and permutations act in place on any number of strided views in one launch: the host side.
#pragma once
#include "compat.h"
#include "view.h"

namespace teleport_fast {

// x → (x + shift) · s^exponent − shift on the rows of one view; s has heads · h entries.
struct DiagonalView {
  View view;
  const void* scale;
  double exponent, shift;
};

// Row i of the result is row index[i]; index has heads · h entries, each head's a permutation of 0 … h − 1.
struct PermutedView {
  View view;
  const int64_t* index;
};

}  // namespace teleport_fast

extern "C" {
// Prepare descriptors on the host; answer the number of tiles (int32 owners), or -1 if a size or a storage is out of range.
// owners may be null to count only. One launch takes float64 views only, or none.
int64_t tf_cuda_diagonal_action_plan(teleport_fast::DiagonalView* views, int64_t count, int32_t* owners);
// -1 also where one column of h values exceeds shared_limit, the bytes of shared memory that a block may have.
int64_t tf_cuda_permutation_action_plan(teleport_fast::PermutedView* views, int64_t count, int64_t shared_limit,
                                        int32_t* owners, int64_t* shared_bytes);

// All pointers on the device. scale64: s is float64, else float32. float64: so are the views.
cudaError_t tf_cuda_diagonal_action_(const teleport_fast::DiagonalView* views, const int32_t* owners, int64_t tiles,
                                     int scale64, int float64, cudaStream_t stream);
cudaError_t tf_cuda_permutation_action_(const teleport_fast::PermutedView* views, const int32_t* owners, int64_t tiles,
                                        int64_t shared_bytes, cudaStream_t stream);
}
