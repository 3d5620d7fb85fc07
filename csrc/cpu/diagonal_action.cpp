// diagonal_action_ on the CPU: blocks of all tensors are shared by all threads.
#include "diagonal_action.h"

#include "../ops.h"
#include "cut.h"

namespace teleport_fast {
namespace {

// 256 KB in float32: enough to hide the cost of an item, few enough to share.
constexpr int64_t kBlockEntries = 64 << 10;

}  // namespace

void diagonal_action_(
    std::vector<Tensor> tensors, Tensor factors, std::vector<int64_t> which, std::vector<double> shifts, int64_t joints) {
  STD_TORCH_CHECK(!tensors.empty() && joints > 0 && tensors.size() % joints == 0, "diagonal_action_: tensors must be ", joints, " equal runs");
  STD_TORCH_CHECK(
      which.size() == tensors.size() && shifts.size() == tensors.size(), "diagonal_action_: which and shifts must be one per tensor");
  const int64_t heads = tensors[0].size(0), h = tensors[0].size(1), run = int64_t(tensors.size()) / joints;
  const bool is_double = tensors[0].scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      factors.dim() == 3 && factors.is_cpu() && factors.is_contiguous() && factors.size(1) == joints * heads && factors.size(2) == h &&
          factors.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
      "diagonal_action_: factors must be contiguous (kinds, ", joints * heads, ", ", h, ") on the CPU, of the accumulation dtype");
  std::vector<Walk<1>> walks;
  std::vector<size_t> index;
  walks.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(which[i] >= 0 && which[i] < factors.size(0), "diagonal_action_: which[", i, "] is out of range");
    const Tensor* operands[] = {&tensors[i]};
    const char* names[] = {"tensors"};
    Walk<1> walk(operands, heads, h, is_double, names, i);
    if (walk.entries() == 0) continue;
    walk.cut_into(kBlockEntries, kBlockEntries);
    walks.push_back(walk);
    index.push_back(i);
  }
  const auto kernel = select_diagonal_item();
  const char* all = static_cast<const char*>(factors.data_ptr());
  for_each_block(walks, disjoint_runs(walks, {0}), [&](size_t w, int64_t b) {
    const size_t i = index[w];
    const int64_t first_row = (which[i] * joints + int64_t(i) / run) * heads * h;
    kernel({walks[w].block(b), walks[w].storage, all + first_row * (is_double ? 8 : 4), shifts[i]});
  });
}

}  // namespace teleport_fast
