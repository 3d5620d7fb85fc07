// gram_difference on the CPU: cuts every joint's columns into panels, runs them on all threads, adds the parts in a fixed order.
#include "gram_difference.h"

#include <algorithm>
#include <tuple>

#include "../ops.h"
#include "host.h"

namespace teleport_fast {
namespace {

// A lone wide joint is split into parts, enough for any machine; the number must not depend on the threads, or the sums' order would.
// A part is worth it from a million multiply-adds on, some 50 us.
constexpr int64_t kParts = 64, kLeastPanels = 4, kPartWork = 1'000'000;
// Partial sums that an item keeps at hand: a quarter of a second-level cache.
constexpr int64_t kItemBytes = 128 << 10;

struct Plan {
  std::vector<View> views;
  std::vector<GramSegment> segments;
  std::vector<GramPanel> panels;
  std::vector<int64_t> first_panel;  // of each joint, and the end

  void add(const View& view, int32_t sign, int64_t joint, int64_t columns) {
    const int64_t depth = gram_depth(view, columns);
    const bool dots = gram_dots(view), heads_inside = view.row_step == 1 && view.inner_step != 1;
    for (int64_t first = 0; first < view.columns();) {
      const bool fresh = int64_t(panels.size()) == first_panel[joint] || panels.back().sign != sign ||
                         panels.back().dots != dots || panels.back().depth >= depth;
      if (fresh) panels.push_back({int64_t(segments.size()), int64_t(segments.size()), 0, sign, dots, heads_inside});
      GramPanel& panel = panels.back();
      const int64_t count = std::min(depth - panel.depth, view.columns() - first);
      segments.push_back({&view, first, count});
      panel.depth += count;
      panel.end_segment = int64_t(segments.size());
      first += count;
    }
  }
};

Plan plan_panels(const std::vector<Tensor>& plus, const std::vector<Tensor>& minus, int64_t joints, int64_t heads, int64_t h, bool is_double) {
  Plan plan;
  plan.views.reserve(plus.size() + minus.size());
  for (size_t i = 0; i < plus.size(); ++i) plan.views.push_back(view_of(plus[i], heads, h, is_double, "G_plus", i));
  for (size_t i = 0; i < minus.size(); ++i) plan.views.push_back(view_of(minus[i], heads, h, is_double, "G_minus", i));
  const int64_t plus_run = int64_t(plus.size()) / joints, minus_run = int64_t(minus.size()) / joints;
  for (int64_t joint = 0; joint < joints; ++joint) {
    plan.first_panel.push_back(int64_t(plan.panels.size()));
    const View *plus_views = plan.views.data() + joint * plus_run, *minus_views = plan.views.data() + plus.size() + joint * minus_run;
    int64_t columns = 0;
    for (int64_t i = 0; i < plus_run; ++i) columns += plus_views[i].columns();
    for (int64_t i = 0; i < minus_run; ++i) columns += minus_views[i].columns();
    for (int64_t i = 0; i < plus_run; ++i) plan.add(plus_views[i], -1, joint, columns);
    for (int64_t i = 0; i < minus_run; ++i) plan.add(minus_views[i], 1, joint, columns);
  }
  plan.first_panel.push_back(int64_t(plan.panels.size()));
  return plan;
}

template <class T, class At>
T pairwise_sum(int64_t first, int64_t end, const At& at) {
  if (end - first == 1) return at(first);
  const int64_t middle = (first + end) / 2;
  return pairwise_sum<T>(first, middle, at) + pairwise_sum<T>(middle, end, at);
}

// D and J of one head from its parts, added in their order; the upper half is the lower half's copy.
template <class T>
void finish(const char* partial, int64_t parts, int64_t part_bytes, int64_t h, int64_t ld, T* D, T* J) {
  auto row_of = [&](int64_t part, int64_t row) { return reinterpret_cast<const T*>(partial + part * part_bytes) + row * ld; };
  for (int64_t i = 0; i < h; ++i) {
    T* to = D + i * h;
    std::copy_n(row_of(0, i), i + 1, to);
    for (int64_t part = 1; part < parts; ++part) {
      const T* row = row_of(part, i);
      for (int64_t j = 0; j <= i; ++j) to[j] += row[j];
    }
    for (int64_t j = 0; j < i; ++j) D[j * h + i] = to[j];
  }
  auto squares = [&](int64_t index) { return row_of(index / h, h)[index % h]; };
  *J = h ? pairwise_sum<T>(0, parts * h, squares) : T(0);
}

}  // namespace

std::tuple<Tensor, Tensor> gram_difference(std::vector<Tensor> plus, std::vector<Tensor> minus, int64_t joints) {
  STD_TORCH_CHECK(!plus.empty() || !minus.empty(), "gram_difference: G_plus and G_minus are both empty");
  STD_TORCH_CHECK(
      joints > 0 && plus.size() % joints == 0 && minus.size() % joints == 0, "gram_difference: the lists must be ", joints, " equal runs");
  const Tensor& like = plus.empty() ? minus[0] : plus[0];
  const int64_t heads = like.size(0), h = like.size(1);
  const bool is_double = like.scalar_type() == ScalarType::Double;
  const int64_t element = is_double ? 8 : 4;
  const Plan plan = plan_panels(plus, minus, joints, heads, h, is_double);

  const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
  Tensor D = torch::stable::new_empty(like, {joints * heads, h, h}, type);
  Tensor J = torch::stable::new_empty(like, {joints * heads}, type);

  if (joints * heads == 0) return {D, J};
  // One partial sum per (joint, head, part); a head's parts lie side by side, so that finish() walks them in order.
  std::vector<int64_t> parts(joints), first_partial(joints + 1, 0), first_item(joints + 1, 0);
  const int64_t part_bytes = (h + 1) * gram_row_bytes(h, element), most_parts = (kParts + joints * heads - 1) / (joints * heads);
  const int64_t threads = threads_at_most();
  const int64_t group = std::max<int64_t>(1, std::min(kItemBytes / part_bytes, joints * heads / (4 * threads)));
  const int64_t groups = (heads + group - 1) / group;
  for (int64_t joint = 0; joint < joints; ++joint) {
    const int64_t panels = plan.first_panel[joint + 1] - plan.first_panel[joint];
    const int64_t work = panels * kGramDepth * h * h / 2;
    parts[joint] = std::max<int64_t>(1, std::min({most_parts, panels / kLeastPanels, work / kPartWork}));
    first_partial[joint + 1] = first_partial[joint] + parts[joint] * heads;
    first_item[joint + 1] = first_item[joint] + parts[joint] * groups;
  }
  const Scratch partials = allocate(first_partial[joints] * part_bytes);
  auto partial_at = [&](int64_t joint, int64_t head, int64_t part) {
    return static_cast<char*>(partials.get()) + (first_partial[joint] + head * parts[joint] + part) * part_bytes;
  };

  const int64_t ld = gram_row_bytes(h, element) / element;
  void *D_out = D.mutable_data_ptr(), *J_out = J.mutable_data_ptr();
  auto finish_head = [&](int64_t joint, int64_t head) {
    const char* partial = partial_at(joint, head, 0);
    const int64_t index = joint * heads + head;
    if (is_double) finish(partial, parts[joint], part_bytes, h, ld, static_cast<double*>(D_out) + index * h * h, static_cast<double*>(J_out) + index);
    else finish(partial, parts[joint], part_bytes, h, ld, static_cast<float*>(D_out) + index * h * h, static_cast<float*>(J_out) + index);
  };

  // Item (joint, group of heads, part).
  const auto kernel = select_gram_item();
  const int64_t items = first_item[joints], work = int64_t(plan.panels.size()) * kGramDepth * heads * h * h / 2;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread * items / std::max<int64_t>(1, work));
  parallel_for(items, grain, gram_scratch_bytes(h, element), [&](int64_t begin, int64_t end, void* packed) {
    int64_t joint = std::upper_bound(first_item.begin(), first_item.end(), begin) - first_item.begin() - 1;
    for (int64_t item = begin; item < end; ++item) {
      while (item >= first_item[joint + 1]) ++joint;
      const int64_t head = (item - first_item[joint]) / parts[joint] * group, part = (item - first_item[joint]) % parts[joint];
      const int64_t base = plan.first_panel[joint], panels = plan.first_panel[joint + 1] - base;
      const int64_t from = base + panels * part / parts[joint], to = base + panels * (part + 1) / parts[joint];
      const int64_t count = std::min(group, heads - head);
      kernel(
          {plan.segments.data(), plan.panels.data() + from, to - from, head, count, h, partial_at(joint, head, part),
           parts[joint] * part_bytes, packed},
          is_double);
      for (int64_t i = 0; i < count && parts[joint] == 1; ++i) finish_head(joint, head + i);
    }
  });
  if (first_partial[joints] == joints * heads) return {D, J};
  const int64_t heads_grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, 4 * h * h));
  parallel_for(joints * heads, heads_grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      if (parts[index / heads] > 1) finish_head(index / heads, index % heads);
  });
  return {D, J};
}

}  // namespace teleport_fast
