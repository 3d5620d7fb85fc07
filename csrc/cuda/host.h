// What launch.cpp's ops share: the device and stream of a call, checked views, and tables sent to the device without a wait.
#pragma once

#ifndef TELEPORT_FAST_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <mutex>
#include <vector>

#include "compat.h"
#include "table.h"
#include "view.h"

namespace teleport_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace teleport_fast
#ifdef TELEPORT_FAST_EMULATED
#include "emulated_gpu.h"
#else
namespace teleport_fast {

using Guard = torch::stable::accelerator::DeviceGuard;
inline bool on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }
inline cudaStream_t current_stream(const char* op, int32_t device) {
  void* found = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &found) == 0, op, ": torch has no current CUDA stream");
  return static_cast<cudaStream_t>(found);
}

}  // namespace teleport_fast
#endif
namespace teleport_fast {

inline void succeed(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA says: ", cudaGetErrorString(error));
}

// Pinned memory that a copy to the device reads after the call is over: free again when its event has passed.
struct Pinned {
  int device;
  void* memory;
  size_t bytes;
  cudaEvent_t done;
};

// One op's device, made current, and its current stream.
class Call {
 public:
  Call(const char* op, const Tensor& like) : op(op), like_(like), device_(like.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(on_gpu(like), op, ": the tensors must be on a CUDA device");
    stream = current_stream(op, device_);
  }
  int64_t attribute(cudaDeviceAttr name) const {
    int value = 0;
    succeed(op, cudaDeviceGetAttribute(&value, name, device_));
    return value;
  }
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int64_t multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // What the sizes ask for and the device has not is told before, by widest().
  void planned(int64_t answer) const {
    STD_TORCH_CHECK(answer >= 0, op, ": the sizes are out of the CUDA kernel's range; use set_backend('auto')");
  }
  void launched(cudaError_t error) const { succeed(op, error); }
  Tensor empty(std::vector<int64_t> sizes, ScalarType type) const { return torch::stable::new_empty(like_, sizes, type); }

  // A copy on the device, in the stream's order: by a launch's arguments where these hold it, and always under capture, since a
  // graph would replay a copy from memory that is gone by then. The caller keeps the answer until its kernel is launched;
  // torch's allocator then hands the memory out again in the same stream only.
  template <class T>
  Tensor send(const std::vector<T>& table) const {
    const size_t bytes = table.size() * sizeof(T);
    Tensor there = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
    if (bytes == 0) return there;
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    succeed(op, cudaStreamIsCapturing(stream, &capturing));
    if (bytes <= static_cast<size_t>(kTableBytes) || capturing != cudaStreamCaptureStatusNone) {
      succeed(op, tf_cuda_table(there.data_ptr(), table.data(), static_cast<int64_t>(bytes), stream));
      return there;
    }
    static std::mutex mutex;
    static std::vector<Pinned>* const pool = new std::vector<Pinned>;  // outlives the CUDA context's own end
    const std::lock_guard<std::mutex> lock(mutex);
    Pinned* place = nullptr;
    for (Pinned& one : *pool) {
      if (one.device == device_ && one.bytes >= bytes && cudaEventQuery(one.done) == cudaSuccess) place = &one;
    }
    if (!place) {
      (void)cudaGetLastError();  // "not ready" is no error
      Pinned fresh{device_, nullptr, (bytes + 65535) / 65536 * 65536, nullptr};
      succeed(op, cudaHostAlloc(&fresh.memory, fresh.bytes, cudaHostAllocDefault));
      succeed(op, cudaEventCreateWithFlags(&fresh.done, cudaEventDisableTiming));
      pool->push_back(fresh);
      place = &pool->back();
    }
    std::memcpy(place->memory, table.data(), bytes);
    succeed(op, cudaMemcpyAsync(there.data_ptr(), place->memory, bytes, cudaMemcpyHostToDevice, stream));
    succeed(op, cudaEventRecord(place->done, stream));
    return there;
  }

  // (heads, h, n) or (heads, h, outer, inner) on the call's device.
  View view(const Tensor& tensor, int64_t heads, int64_t h, bool is_double, int64_t joint) const {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    STD_TORCH_CHECK(on_gpu(tensor) && tensor.get_device_index() == device_, op, ": all tensors must be on one CUDA device");
    STD_TORCH_CHECK((sizes.size() == 3 || sizes.size() == 4) && sizes[0] == heads && sizes[1] == h, op,
                    ": every view must be (", heads, ", ", h, ", ...) with 3 or 4 dimensions");
    for (int64_t size : sizes) STD_TORCH_CHECK(size <= INT32_MAX, op, ": a size is over 2^31 - 1, got ", size);
    const ScalarType type = tensor.scalar_type();
    const bool known = type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
                       type == ScalarType::Half;
    STD_TORCH_CHECK(known && (type == ScalarType::Double) == is_double, op,
                    ": tensors must be float64 throughout, or float32, bfloat16 and float16");
    const bool flat = sizes.size() == 3;
    View view{};
    view.data = tensor.data_ptr();
    view.head_stride = strides[0];
    view.row_stride = strides[1];
    view.outer_stride = flat ? 0 : strides[2];
    view.inner_stride = strides[flat ? 2 : 3];
    view.heads = static_cast<int32_t>(heads);
    view.rows = static_cast<int32_t>(h);
    view.outer = flat ? 1 : static_cast<int32_t>(sizes[2]);
    view.inner = static_cast<int32_t>(sizes[flat ? 2 : 3]);
    view.storage = type == ScalarType::Double     ? kFloat64
                   : type == ScalarType::Float    ? kFloat32
                   : type == ScalarType::BFloat16 ? kBFloat16
                                                  : kFloat16;
    view.joint = static_cast<int32_t>(joint);
    return view;
  }

  // A contiguous tensor of this dtype and shape on the call's device, or an error that names it.
  void expect(const Tensor& tensor, std::vector<int64_t> sizes, ScalarType type, const char* name) const {
    bool fits = on_gpu(tensor) && tensor.get_device_index() == device_ && tensor.is_contiguous() &&
                tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(static_cast<int64_t>(i)) == sizes[i];
    STD_TORCH_CHECK(fits, op, ": ", name, " has another shape, dtype or device than the views ask for, or is not contiguous");
  }

  const char* op;
  cudaStream_t stream;

 private:
  Tensor like_;
  int32_t device_;
  Guard guard_;
};

using Tensors = std::vector<Tensor>;

inline bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }
inline ScalarType accumulator(bool float64) { return float64 ? ScalarType::Double : ScalarType::Float; }

inline const Tensor& first_of(const char* op, const Tensors& tensors, int64_t joints) {
  const bool equal = joints > 0 && !tensors.empty() && static_cast<int64_t>(tensors.size()) % joints == 0;
  STD_TORCH_CHECK(equal, op, ": the tensors must be ", joints, " equal runs, got ", tensors.size());
  STD_TORCH_CHECK(tensors[0].dim() == 3 || tensors[0].dim() == 4, op, ": views have 3 or 4 dimensions");
  return tensors[0];
}

inline const char* row_of(const Tensor& table, int64_t row, int64_t step, int64_t size) {
  return static_cast<const char*>(table.data_ptr()) + row * step * size;
}

template <class T>
const T* on_device(const Tensor& table) {
  return static_cast<const T*>(table.data_ptr());
}

// Row `kind` of (kinds, joints · heads, h) factors, at a joint's first head.
inline const void* factors_of(const Tensor& factors, int64_t kind, int64_t joint, int64_t heads, bool float64) {
  STD_TORCH_CHECK(kind >= 0 && kind < factors.size(0), "factors have no kind ", kind);
  return row_of(factors, kind * factors.size(1) + joint * heads, factors.size(2), float64 ? 8 : 4);
}

}  // namespace teleport_fast
