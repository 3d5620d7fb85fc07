// activation_action and its tangent on the CPU: the threads share panels of columns, each packed, multiplied and stored in one go.
#include "activation_action.h"

#include <algorithm>

#include "../ops.h"
#include "host.h"

namespace teleport_fast {
namespace {

Tensor act(const char* op, const Tensor& Z, const Tensor& matrix, const Tensor& slope, bool tangent) {
  STD_TORCH_CHECK(Z.dim() == 3, op, ": Z must be (batch, h, B)");
  const bool is_double = Z.scalar_type() == ScalarType::Double;
  const int64_t batch = Z.size(0), h = Z.size(1), columns = Z.size(2), element = is_double ? 8 : 4;
  const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      matrix.is_cpu() && matrix.is_contiguous() && matrix.dim() == 3 && (matrix.size(0) == batch || matrix.size(0) == 1) &&
          matrix.size(1) == h && matrix.size(2) == h && matrix.scalar_type() == type,
      op, ": the matrix must be contiguous (", batch, " or 1, ", h, ", ", h, ") on the CPU, of the accumulator's dtype");
  STD_TORCH_CHECK(
      slope.is_cpu() && slope.is_contiguous() && slope.dim() == 1 && slope.size(0) == h && slope.scalar_type() == type,
      op, ": the slopes must be contiguous (", h, ",) on the CPU, of the accumulator's dtype");
  const View view = view_of(Z, batch, h, is_double, "Z", 0);
  Tensor out = torch::stable::new_empty(Z, {batch, h, columns}, Z.scalar_type());
  if (batch * h * columns == 0) return out;

  const auto kernel = select_activation_item();
  const int64_t panels = (columns + kActivationColumns - 1) / kActivationColumns;
  const int64_t matrix_step = matrix.size(0) == 1 ? 0 : h * h * element;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (h * h * std::min(columns, kActivationColumns)));
  parallel_for(batch * panels, grain, activation_scratch(h, element), [&](int64_t begin, int64_t end, void* scratch) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / panels, first = i % panels * kActivationColumns;
      kernel(
          {&view, head, first, std::min(kActivationColumns, columns - first), h,
           static_cast<const char*>(matrix.data_ptr()) + head * matrix_step, slope.data_ptr(), out.data_ptr(), columns, tangent, scratch},
          is_double);
    }
  });
  return out;
}

}  // namespace

Tensor activation_action(Tensor Z, Tensor g, Tensor slope) { return act("activation_action", Z, g, slope, false); }

Tensor activation_action_tangent(Tensor Z, Tensor M, Tensor slope) { return act("activation_action_tangent", Z, M, slope, true); }

}  // namespace teleport_fast
