// A small table on the device without a copy: its bytes travel as a launch's argument, and a CUDA graph keeps them.
#pragma once
#include "compat.h"

namespace teleport_fast {

constexpr int64_t kTableBytes = 3584;  // of one launch; an argument list may have 4 KiB

}  // namespace teleport_fast

extern "C" {
// from: on the host, read before the call is over; to: on the device. bytes: a multiple of 4; a launch for every kTableBytes.
cudaError_t tf_cuda_table(void* to, const void* from, int64_t bytes, cudaStream_t stream);
}
