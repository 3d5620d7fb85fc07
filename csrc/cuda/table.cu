// Writes a table's bytes from the launch's own arguments to global memory: a captured graph replays them from its node.
//
// Moves each byte once out. Launch: one block of 128 threads for every 3,584 bytes.
// Loses to a copy from pinned memory for tables of many launches (where the line is: unmeasured).
#include "table.h"

#include <cstring>

namespace teleport_fast {

constexpr int kThreads = 128;

struct TableWords {
  uint32_t words[kTableBytes / 4];
};

__global__ void __launch_bounds__(kThreads) table_kernel(uint32_t* to, int count, TableWords table) {
  for (int i = threadIdx.x; i < count; i += kThreads) gstore(to + i, table.words[i]);
}

}  // namespace teleport_fast

using namespace teleport_fast;

cudaError_t tf_cuda_table(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  if (bytes % 4 != 0) return static_cast<cudaError_t>(1);
  for (int64_t done = 0; done < bytes; done += kTableBytes) {
    const int64_t here = bytes - done < kTableBytes ? bytes - done : kTableBytes;
    TableWords table;
    std::memcpy(table.words, static_cast<const char*>(from) + done, static_cast<size_t>(here));
    uint32_t* place = static_cast<uint32_t*>(to) + done / 4;
    const cudaError_t error = TF_LAUNCH(table_kernel, 1u, kThreads, 0, stream, place, static_cast<int>(here / 4), table);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
