// teleport_adamw_ on the CPU: blocks of all parameters are shared by all threads.
#include "teleport_adamw.h"

#include <cmath>

#include "../ops.h"
#include "cut.h"

namespace teleport_fast {
namespace {

// 128 KB of each operand in float32: enough to hide the cost of an item, few enough to share.
constexpr int64_t kBlockEntries = 32 << 10;

}  // namespace

void teleport_adamw_(
    std::vector<Tensor> parameters, std::vector<Tensor> gradients, std::vector<Tensor> first_moments, std::vector<Tensor> second_moments,
    Tensor factors, std::vector<int64_t> which, std::vector<double> shifts, double step, double lr, double beta1, double beta2, double eps,
    double weight_decay, int64_t joints) {
  const size_t count = parameters.size();
  STD_TORCH_CHECK(count > 0 && joints > 0 && count % joints == 0, "teleport_adamw_: parameters must be ", joints, " equal runs");
  STD_TORCH_CHECK(
      gradients.size() == count && first_moments.size() == count && second_moments.size() == count && which.size() == 2 * count &&
          shifts.size() == count,
      "teleport_adamw_: the lists must be of one length");
  const int64_t heads = parameters[0].size(0), h = parameters[0].size(1), run = int64_t(count) / joints;
  const bool is_double = parameters[0].scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      factors.dim() == 3 && factors.is_cpu() && factors.is_contiguous() && factors.size(1) == joints * heads && factors.size(2) == h &&
          factors.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
      "teleport_adamw_: factors must be contiguous (kinds, ", joints * heads, ", ", h, ") on the CPU, of the accumulation dtype");
  for (const int64_t kind : which) STD_TORCH_CHECK(kind >= 0 && kind < factors.size(0), "teleport_adamw_: which is out of range");
  std::vector<Walk<4>> walks;
  std::vector<size_t> index;
  walks.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor* operands[] = {&parameters[i], &gradients[i], &first_moments[i], &second_moments[i]};
    const char* names[] = {"parameters", "gradients", "first_moments", "second_moments"};
    Walk<4> walk(operands, heads, h, is_double, names, i);
    if (walk.entries() == 0) continue;
    walk.cut_into(kBlockEntries, kBlockEntries);
    walks.push_back(walk);
    index.push_back(i);
  }
  const AdamwStep numbers{
      beta1, beta2, eps, 1 - lr * weight_decay, lr / (1 - std::pow(beta1, step)), 1 / std::sqrt(1 - std::pow(beta2, step))};
  const auto kernel = select_adamw_item();
  const char* all = static_cast<const char*>(factors.data_ptr());
  for_each_block(walks, disjoint_runs(walks, {0, 2, 3}), [&](size_t w, int64_t b) {
    const size_t i = index[w];
    auto rows = [&](int64_t kind) { return all + (kind * joints + int64_t(i) / run) * heads * h * (is_double ? 8 : 4); };
    kernel({walks[w].block(b), walks[w].storage, rows(which[i]), rows(which[count + i]), shifts[i], numbers});
  });
}

}  // namespace teleport_fast
