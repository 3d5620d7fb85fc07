// Row square sums and row l1 sums of many strided views in one launch: the host side.
#pragma once
#include "compat.h"
#include "view.h"

namespace teleport_fast {

// The rows of one joint: where its partial sums and its results begin, and how many partial sums a row has.
struct JointRows {
  int64_t partial, out;
  int32_t rows;  // heads · h; the caller fills this in
  int32_t slots, first_block, unused;
};

// What the caller allocates: tiles + finish_blocks int32 of owners, 2 · partials accumulators of workspace.
struct SquareSumsPlan {
  int64_t tiles, finish_blocks, partials;
};

}  // namespace teleport_fast

extern "C" {
// Prepares descriptors on the host. With owners null it only counts; -1 if a size or a storage is out of range.
int tf_cuda_square_sums_plan(teleport_fast::View* views, int64_t view_count, teleport_fast::JointRows* joints,
                             int64_t joint_count, int32_t* owners, teleport_fast::SquareSumsPlan* plan);
// All pointers on the device. accumulate64: every view is float64, and so are workspace, squares and l1; else float32.
cudaError_t tf_cuda_square_sums(const teleport_fast::View* views, const teleport_fast::JointRows* joints,
                                const int32_t* owners, const teleport_fast::SquareSumsPlan* plan, void* workspace,
                                void* squares, void* l1, int accumulate64, cudaStream_t stream);
}
