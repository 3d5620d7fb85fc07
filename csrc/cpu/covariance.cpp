// covariance_ on the CPU: every tensor's Gram on all threads, its trace as the weight, then C in one pass.
#include "covariance.h"

#include <algorithm>
#include <cmath>

#include "../ops.h"
#include "gram_difference.h"
#include "host.h"

namespace teleport_fast {
namespace {

// Panels of a part: a tensor of more than 3,072 columns (4,096 where float32 rows are contiguous) is shared by threads. It must not
// depend on their number.
constexpr int64_t kPartPanels = 16;
// Grams that an item keeps at hand: a quarter of a second-level cache.
constexpr int64_t kItemBytes = 128 << 10;

struct Plan {
  std::vector<View> views;
  std::vector<GramSegment> segments;
  std::vector<GramPanel> panels;
  // Of each tensor, and the end: its panels, its parts, its Grams.
  std::vector<int64_t> first_panel{0}, first_part{0};

  void add(const View& view) {
    const bool dots = gram_dots(view), heads_inside = view.row_step == 1 && view.inner_step != 1;
    const int64_t depth = dots ? gram_depth(view, view.columns()) : kGramDepth;
    for (int64_t first = 0; first < view.columns(); first += depth) {
      const int64_t segment = int64_t(segments.size()), count = std::min(depth, view.columns() - first);
      segments.push_back({&view, first, count});
      panels.push_back({segment, segment + 1, count, 1, dots, heads_inside});
    }
    first_panel.push_back(int64_t(panels.size()));
    const int64_t count = first_panel.back() - first_panel[first_panel.size() - 2];
    first_part.push_back(first_part.back() + (count + kPartPanels - 1) / kPartPanels);
  }
};

// (1 - decay) / ‖G‖², or 0 where the gradient is zero or not finite.
template <class T>
double weight_of(const char* gram, int64_t count, int64_t gram_bytes, int64_t diagonal, int64_t h, double decay) {
  double trace = 0;
  for (int64_t c = 0; c < count; ++c) {
    const T* row = reinterpret_cast<const T*>(gram + c * gram_bytes + diagonal);
    for (int64_t i = 0; i < h; ++i) trace += double(row[i]);
  }
  const T weight = T(1 - decay) / T(trace);
  return std::isfinite(weight) && weight > 0 ? double(weight) : 0.0;
}

}  // namespace

void covariance_(Tensor covariance, std::vector<Tensor> tensors, double decay, int64_t joints) {
  STD_TORCH_CHECK(joints > 0 && tensors.size() % joints == 0, "covariance_: the list must be ", joints, " equal runs");
  STD_TORCH_CHECK(covariance.dim() == 3, "covariance_: covariance must have 3 dimensions");
  const int64_t h = covariance.size(1), heads = covariance.size(0) / joints;
  const bool is_double = covariance.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      covariance.is_cpu() && covariance.is_contiguous() && covariance.size(0) == joints * heads && covariance.size(2) == h &&
          covariance.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
      "covariance_: covariance must be contiguous (", joints * heads, ", ", h, ", ", h, ") on the CPU, float32 or float64");
  const int64_t element = is_double ? 8 : 4;
  Plan plan;
  plan.views.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    plan.views.push_back(view_of(tensors[i], heads, h, is_double, "tensors", i));
    plan.add(plan.views.back());
  }
  if (heads == 0 || h == 0) return;

  // Gram (part, head), as gram_item leaves it: h rows of the lower triangle and one of the diagonal.
  const int64_t gram_bytes = (h + 1) * gram_row_bytes(h, element), parts = plan.first_part.back();
  const Scratch grams = allocate(parts * heads * gram_bytes);
  auto gram_at = [&](int64_t part, int64_t head) { return static_cast<char*>(grams.get()) + (part * heads + head) * gram_bytes; };

  // Threads share (panel, group of heads) evenly; a part belongs to the one that has its first panel.
  const auto gram = select_gram_item();
  const int64_t threads = threads_at_most();
  const int64_t group = std::max<int64_t>(1, std::min(kItemBytes / gram_bytes, heads * parts / (4 * threads)));
  const int64_t groups = (heads + group - 1) / group, units = int64_t(plan.panels.size()) * groups;
  const int64_t unit_work = kGramDepth * h * h / 2 * std::min(group, heads);
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / unit_work);
  parallel_for(units, grain, gram_scratch_bytes(h, element), [&](int64_t begin, int64_t end, void* packed) {
    size_t t = std::upper_bound(plan.first_panel.begin(), plan.first_panel.end(), begin / groups) - plan.first_panel.begin() - 1;
    for (int64_t panel = begin / groups; panel * groups < end; ++panel) {
      while (panel >= plan.first_panel[t + 1]) ++t;
      const int64_t inside = panel - plan.first_panel[t];
      if (inside % kPartPanels) continue;
      const int64_t count = std::min(kPartPanels, plan.first_panel[t + 1] - panel), part = plan.first_part[t] + inside / kPartPanels;
      for (int64_t g = std::max<int64_t>(0, begin - panel * groups); g < groups && panel * groups + g < end; ++g) {
        const int64_t head = g * group;
        gram(
            {plan.segments.data(), plan.panels.data() + panel, count, head, std::min(group, heads - head), h, gram_at(part, head),
             gram_bytes, packed},
            is_double);
      }
    }
  });

  // What C takes up, by joint; a weight is over all heads and parts of a tensor.
  const int64_t run = int64_t(tensors.size()) / joints, diagonal = h * gram_row_bytes(h, element);
  std::vector<WeightedGram> weighted;
  std::vector<int64_t> first_weighted{0};
  int64_t most = 0;
  for (int64_t joint = 0; joint < joints; ++joint) {
    for (int64_t t = joint * run; t < (joint + 1) * run; ++t) {
      const int64_t first = plan.first_part[t], count = plan.first_part[t + 1] - first;
      if (count == 0) continue;
      const auto weight = (is_double ? weight_of<double> : weight_of<float>)(
          gram_at(first, 0), count * heads, gram_bytes, diagonal, h, decay);
      if (weight == 0) continue;
      for (int64_t part = first; part < first + count; ++part) weighted.push_back({gram_at(part, 0), weight});
    }
    most = std::max(most, int64_t(weighted.size()) - first_weighted.back());
    first_weighted.push_back(int64_t(weighted.size()));
  }

  const auto kernel = select_covariance_rows();
  const int64_t row_work = h * (1 + int64_t(weighted.size()) / joints);
  // Rows grow with their number, so threads take turns in short blocks.
  constexpr int64_t kRows = 16;
  const int64_t blocks = (h + kRows - 1) / kRows, items = joints * heads * blocks;
  const int64_t rows_grain = std::max<int64_t>(1, kWorthAThread / (kRows * row_work)), bytes = most * int64_t(sizeof(WeightedGram));
  parallel_for(items, rows_grain, bytes, [&](int64_t begin, int64_t end, void* scratch) {
    auto* own = static_cast<WeightedGram*>(scratch);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t matrix = item / blocks, joint = matrix / heads, head = matrix % heads;
      const int64_t count = first_weighted[joint + 1] - first_weighted[joint];
      std::copy_n(weighted.begin() + first_weighted[joint], count, own);
      for (int64_t s = 0; s < count; ++s) own[s].gram += head * gram_bytes;
      // Short and long rows in turn: block 0, the last, block 1, the last but one.
      const int64_t turn = item % blocks, block = turn % 2 ? blocks - 1 - turn / 2 : turn / 2;
      const int64_t first = block * kRows;
      kernel(
          {own, count, first, std::min(first + kRows, h), h, decay,
           static_cast<char*>(covariance.data_ptr()) + matrix * h * h * element},
          is_double);
    }
  });
}

}  // namespace teleport_fast
