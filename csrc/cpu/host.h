// What the host sides of the CPU kernels share: checked tensors as views, and the work a thread is worth waking for.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "parallel.h"
#include "storage.h"

namespace teleport_fast {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// Multiply-adds that take as long as waking a thread, about 10 us.
constexpr int64_t kWorthAThread = 200'000;

// (heads, h, n) or (heads, h, outer, inner) on the CPU, float64 where `is_double` and otherwise float32, bfloat16 or float16.
inline View view_of(const Tensor& tensor, int64_t heads, int64_t h, bool is_double, const char* name, size_t index) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  STD_TORCH_CHECK(tensor.is_cpu(), name, "[", index, "] must be on the CPU");
  STD_TORCH_CHECK(
      (sizes.size() == 3 || sizes.size() == 4) && sizes[0] == heads && sizes[1] == h,
      name, "[", index, "] must be (", heads, ", ", h, ", ...) with 3 or 4 dimensions");
  View view;
  view.data = tensor.data_ptr();
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Double) view.storage = Storage::Float64;
  else if (type == ScalarType::Float) view.storage = Storage::Float32;
  else if (type == ScalarType::BFloat16) view.storage = Storage::BFloat16;
  else if (type == ScalarType::Half) view.storage = Storage::Half;
  else STD_TORCH_CHECK(false, name, "[", index, "] must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK((view.storage == Storage::Float64) == is_double, name, "[", index, "]: float64 goes with float64 only");
  view.head_step = strides[0];
  view.row_step = strides[1];
  const bool flat = sizes.size() == 3;
  view.outer = flat ? 1 : sizes[2];
  view.outer_step = flat ? 0 : strides[2];
  view.inner = flat ? sizes[2] : sizes[3];
  view.inner_step = flat ? strides[2] : strides[3];
  // Columns may come in any order: the long or contiguous run goes inside, and one run is better than two.
  if (view.outer == 1 || view.outer_step == view.inner * view.inner_step) {
    view.inner *= view.outer;
    view.outer = 1;
  } else if (view.inner == 1 || view.outer_step == 1 || (view.row_step == 1 && view.outer > view.inner)) {
    std::swap(view.outer, view.inner);
    std::swap(view.outer_step, view.inner_step);
  }
  return view;
}

}  // namespace teleport_fast
