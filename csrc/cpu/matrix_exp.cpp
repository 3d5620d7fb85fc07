// matrix_exp and matrix_exp_pair on the CPU: the threads share the batch.
#include "matrix_exp.h"

#include <algorithm>
#include <tuple>

#include "../ops.h"
#include "host.h"

namespace teleport_fast {
namespace {

void run(const Tensor& matrices, Tensor& plus, Tensor* minus) {
  const bool is_double = matrices.scalar_type() == ScalarType::Double;
  const int64_t batch = matrices.size(0), h = matrices.size(1), bytes = h * h * (is_double ? 8 : 4);
  if (batch * h == 0) return;
  const auto kernel = select_exp_item();
  // About eight products a matrix.
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (8 * h * h * h));
  parallel_for(batch, grain, exp_scratch(h, is_double ? 8 : 4), [&](int64_t begin, int64_t end, void* scratch) {
    auto at = [&](const Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()) + begin * bytes; };
    kernel({at(matrices), at(plus), minus ? at(*minus) : nullptr, end - begin, h, scratch}, is_double);
  });
}

void check(const Tensor& matrices) {
  const ScalarType type = matrices.scalar_type();
  STD_TORCH_CHECK(
      matrices.is_cpu() && matrices.is_contiguous() && matrices.dim() == 3 && matrices.size(1) == matrices.size(2) &&
          (type == ScalarType::Float || type == ScalarType::Double),
      "matrix_exp: M must be contiguous (batch, h, h) on the CPU, float32 or float64");
}

Tensor like(const Tensor& matrices) {
  return torch::stable::new_empty(matrices, {matrices.size(0), matrices.size(1), matrices.size(1)}, matrices.scalar_type());
}

}  // namespace

Tensor matrix_exp(Tensor matrices) {
  check(matrices);
  Tensor plus = like(matrices);
  run(matrices, plus, nullptr);
  return plus;
}

std::tuple<Tensor, Tensor> matrix_exp_pair(Tensor matrices) {
  check(matrices);
  Tensor plus = like(matrices), minus = like(matrices);
  run(matrices, plus, &minus);
  return {plus, minus};
}

}  // namespace teleport_fast
