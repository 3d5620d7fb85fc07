// grad_norm_objective on the CPU: each side's Grams once, then the threads share all candidates' group elements.
#include "grad_norm_objective.h"

#include <algorithm>

#include "../ops.h"
#include "host.h"

namespace teleport_fast {

Tensor grad_norm_objective(std::vector<Tensor> plus, std::vector<Tensor> minus, Tensor g, int64_t joints) {
  STD_TORCH_CHECK(!plus.empty() || !minus.empty(), "grad_norm_objective: G_plus and G_minus are both empty");
  const Tensor& like = plus.empty() ? minus[0] : plus[0];
  const int64_t h = like.size(1), matrices = like.size(0) * joints;
  const bool is_double = like.scalar_type() == ScalarType::Double;
  const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      g.is_cpu() && g.is_contiguous() && g.dim() == 4 && g.size(1) == matrices && g.size(2) == h && g.size(3) == h &&
          g.scalar_type() == type,
      "grad_norm_objective: g must be contiguous (candidates, ", matrices, ", ", h, ", ", h, ") on the CPU, of the Grams' dtype");
  const std::vector<Tensor> none;
  // −S₊ and S₋.
  const Tensor gram_plus = plus.empty() ? g : std::get<0>(gram_difference(plus, none, joints));
  const Tensor gram_minus = minus.empty() ? g : std::get<0>(gram_difference(none, minus, joints));
  Tensor J = torch::stable::new_empty(g, {g.size(0), matrices}, type);

  const auto kernel = select_objective_item();
  const int64_t element = is_double ? 8 : 4, bytes = h * h * element;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (4 * h * h * h + 1));
  parallel_for(g.size(0) * matrices, grain, objective_scratch(h, element), [&](int64_t begin, int64_t end, void* scratch) {
    auto at = [&](const Tensor& tensor, int64_t index, int64_t step) { return static_cast<char*>(tensor.data_ptr()) + index * step; };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t matrix = i % matrices;
      kernel(
          {at(g, i, bytes), plus.empty() ? nullptr : at(gram_plus, matrix, bytes), minus.empty() ? nullptr : at(gram_minus, matrix, bytes),
           at(J, i, element), h, scratch},
          is_double);
    }
  });
  return J;
}

}  // namespace teleport_fast
