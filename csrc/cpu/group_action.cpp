// group_action_ on the CPU: every head of every tensor is cut into runs of columns, which all threads share.
#include "group_action.h"

#include <algorithm>

#include "../ops.h"
#include "host.h"

namespace teleport_fast {
namespace {

// Columns of an item: enough to pay for packing g, few enough to share.
constexpr int64_t kItemColumns = 8 * kActionColumns;

struct Target {
  View view;
  const char* g;  // of the joint's first head
  int64_t first_item, runs;
  char *begin, *end;  // the bytes between its first and its last element
};

int64_t element_bytes(Storage storage) {
  return storage == Storage::Float64 ? 8 : storage == Storage::Float32 ? 4 : 2;
}

Target target(const View& view, const void* g, int64_t heads, int64_t h) {
  int64_t low = 0, high = 1;
  const int64_t sizes[] = {heads, h, view.outer, view.inner};
  const int64_t steps[] = {view.head_step, view.row_step, view.outer_step, view.inner_step};
  for (int d = 0; d < 4; ++d) (steps[d] < 0 ? low : high) += (sizes[d] - 1) * steps[d];
  char* data = static_cast<char*>(view.data);
  const int64_t bytes = element_bytes(view.storage);
  return {view, static_cast<const char*>(g), 0, (view.columns() + kItemColumns - 1) / kItemColumns, data + low * bytes, data + high * bytes};
}

bool any_overlap(const std::vector<Target>& targets) {
  std::vector<std::pair<char*, char*>> spans;
  for (const Target& t : targets) spans.push_back({t.begin, t.end});
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].first < spans[i - 1].second) return true;
  }
  return false;
}

// Targets [from, to), which share no memory, and the items that they are cut into.
struct Run {
  size_t from, to;
  int64_t items = 0, grain = 1;

  Run(std::vector<Target>& targets, size_t from, size_t to, int64_t heads, int64_t h) : from(from), to(to) {
    int64_t columns = 0;
    for (size_t t = from; t < to; ++t) {
      targets[t].first_item = items;
      items += targets[t].runs * heads;
      columns += targets[t].view.columns() * heads;
    }
    grain = std::max<int64_t>(1, kWorthAThread * items / std::max<int64_t>(1, columns * h * h));
  }
};

void move(const std::vector<Target>& targets, const Run& run, int64_t heads, int64_t h, bool is_double, const ThreadScratch& scratch) {
  const auto kernel = select_action_item();
  const int64_t matrix_bytes = h * h * (is_double ? 8 : 4);
  parallel_for(run.items, run.grain, scratch, [&](int64_t begin, int64_t end, void* own) {
    auto after = [](int64_t item, const Target& t) { return item < t.first_item; };
    size_t t = std::upper_bound(targets.begin() + run.from, targets.begin() + run.to, begin, after) - targets.begin() - 1;
    for (int64_t item = begin; item < end; ++item) {
      while (item >= targets[t].first_item + targets[t].runs * heads) ++t;
      const Target& target = targets[t];
      // Heads vary fastest: where rows are contiguous, the next head lies nearer than the next columns.
      const int64_t head = (item - target.first_item) % heads, first = (item - target.first_item) / heads * kItemColumns;
      const int64_t count = std::min(kItemColumns, target.view.columns() - first);
      kernel({&target.view, target.g + head * matrix_bytes, head, first, count, h, own}, is_double);
    }
  });
}

}  // namespace

void group_action_(std::vector<Tensor> plus, std::vector<Tensor> minus, Tensor g, Tensor g_inverse_t, int64_t joints) {
  STD_TORCH_CHECK(
      joints > 0 && plus.size() % joints == 0 && minus.size() % joints == 0, "group_action_: the lists must be ", joints, " equal runs");
  const int64_t h = g.size(1), heads = g.size(0) / joints;
  const bool is_double = g.scalar_type() == ScalarType::Double;
  for (const Tensor* m : {&g, &g_inverse_t}) {
    STD_TORCH_CHECK(
        m->dim() == 3 && m->is_cpu() && m->is_contiguous() && m->size(0) == joints * heads && m->size(1) == h && m->size(2) == h &&
            m->scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
        "group_action_: g and g_inverse_t must be contiguous (", joints * heads, ", ", h, ", ", h, ") on the CPU, of one dtype");
  }
  std::vector<Target> targets;
  targets.reserve(plus.size() + minus.size());
  auto add = [&](const std::vector<Tensor>& tensors, const Tensor& matrices, const char* name) {
    const int64_t run = int64_t(tensors.size()) / joints, joint_bytes = heads * h * h * (is_double ? 8 : 4);
    for (size_t i = 0; i < tensors.size(); ++i) {
      const View view = view_of(tensors[i], heads, h, is_double, name, i);
      if (view.columns() == 0 || heads == 0 || h == 0) continue;
      targets.push_back(target(view, static_cast<const char*>(matrices.data_ptr()) + int64_t(i) / run * joint_bytes, heads, h));
    }
  };
  add(plus, g, "plus");
  add(minus, g_inverse_t, "minus");
  // Two views of one memory move one after the other, in the order of the lists; views that only interlace lose some speed so.
  std::vector<Run> runs;
  const bool overlap = any_overlap(targets);
  size_t from = 0;
  for (size_t to = overlap ? 1 : targets.size(); to <= targets.size(); ++to) {
    bool meets = to == targets.size();
    for (size_t t = from; t < to && !meets; ++t) meets = targets[t].begin < targets[to].end && targets[to].begin < targets[t].end;
    if (!meets) continue;
    runs.emplace_back(targets, from, to, heads, h);
    from = to;
  }
  int64_t chunks = 1;
  for (const Run& run : runs) chunks = std::max(chunks, chunks_of(run.items, run.grain));
  const ThreadScratch scratch(action_scratch(h) * (is_double ? 8 : 4), chunks);
  for (const Run& run : runs) move(targets, run, heads, h, is_double, scratch);
}

}  // namespace teleport_fast
