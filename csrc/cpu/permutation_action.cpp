// permutation_action_ on the CPU: rows of contiguous columns go round their cycles, contiguous rows are gathered column by column.
#include <cstring>

#include "../ops.h"
#include "cut.h"

namespace teleport_fast {
namespace {

// Columns that move together: 16 KB of a row in float32, a quarter of it held aside, inside a first-level cache.
constexpr int64_t kRun = 4096;

// One head's permutation as moves: row `to` takes what row `from` held; -1 is the row held aside.
struct Move {
  int32_t to, from;
};

struct Target {
  Walk<1> walk;
  View view;
  size_t joint;
};

// Moves of every head, and whether its rows are a permutation at all.
std::vector<std::vector<Move>> cycles(const int64_t* index, int64_t heads, int64_t h) {
  std::vector<std::vector<Move>> moves(heads);
  std::vector<char> seen(h);
  for (int64_t head = 0; head < heads; ++head, index += h) {
    std::fill(seen.begin(), seen.end(), 0);
    for (int64_t r = 0; r < h; ++r) {
      STD_TORCH_CHECK(index[r] >= 0 && index[r] < h && !seen[index[r]], "permutation_action_: index[", head, "] is no permutation");
      seen[index[r]] = 1;
    }
    for (int64_t r = 0; r < h; ++r) {
      if (!seen[r] || index[r] == r) continue;
      moves[head].push_back({-1, int32_t(r)});
      int64_t to = r;
      for (; index[to] != r; to = index[to]) {
        moves[head].push_back({int32_t(to), int32_t(index[to])});
        seen[to] = 0;
      }
      moves[head].push_back({int32_t(to), -1});
      seen[to] = 0;
    }
  }
  return moves;
}

template <class Bits>
void permute_runs(Bits* x, const View& view, int64_t count, const std::vector<Move>& moves, Bits* aside) {
  for (const Move& move : moves) {
    Bits* to = move.to < 0 ? aside : x + move.to * view.row_step;
    const Bits* from = move.from < 0 ? aside : x + move.from * view.row_step;
    const int64_t to_step = move.to < 0 ? 1 : view.inner_step, from_step = move.from < 0 ? 1 : view.inner_step;
    if (view.inner_step == 1) std::memcpy(to, from, size_t(count) * sizeof(Bits));
    else
      for (int64_t i = 0; i < count; ++i) to[i * to_step] = from[i * from_step];
  }
}

template <class Bits>
void permute_columns(Bits* x, const View& view, int64_t count, const int64_t* index, int64_t h, Bits* aside) {
  for (int64_t c = 0; c < count; ++c, x += view.inner_step) {
    std::memcpy(aside, x, size_t(h) * sizeof(Bits));
    for (int64_t r = 0; r < h; ++r) x[r] = aside[index[r]];
  }
}

template <class Bits>
void permute(const View& view, int64_t head, int64_t first, int64_t count, const int64_t* index, const std::vector<Move>& moves, int64_t h, void* aside) {
  const bool rows_contiguous = view.row_step == 1 && view.inner_step != 1;
  for (int64_t column = first; count > 0;) {
    const int64_t outer = column / view.inner, inner = column % view.inner, n = std::min(count, view.inner - inner);
    Bits* x = static_cast<Bits*>(view.data) + head * view.head_step + outer * view.outer_step + inner * view.inner_step;
    if (rows_contiguous) permute_columns(x, view, n, index, h, static_cast<Bits*>(aside));
    else permute_runs(x, view, n, moves, static_cast<Bits*>(aside));
    column += n;
    count -= n;
  }
}

}  // namespace

void permutation_action_(std::vector<Tensor> tensors, Tensor index, int64_t joints) {
  STD_TORCH_CHECK(
      !tensors.empty() && joints > 0 && tensors.size() % joints == 0, "permutation_action_: tensors must be ", joints, " equal runs");
  const int64_t heads = tensors[0].size(0), h = tensors[0].size(1), run = int64_t(tensors.size()) / joints;
  STD_TORCH_CHECK(
      index.dim() == 2 && index.is_cpu() && index.is_contiguous() && index.scalar_type() == ScalarType::Long &&
          index.size(0) == joints * heads && index.size(1) == h,
      "permutation_action_: index must be contiguous int64 (", joints * heads, ", ", h, ") on the CPU");
  const int64_t* rows = static_cast<const int64_t*>(index.data_ptr());
  const auto moves = cycles(rows, joints * heads, h);
  std::vector<Walk<1>> walks;
  std::vector<Target> targets;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool is_double = tensors[i].scalar_type() == ScalarType::Double;
    const Tensor* operands[] = {&tensors[i]};
    const char* names[] = {"tensors"};
    const Walk<1> walk(operands, heads, h, is_double, names, i);
    if (walk.entries() == 0) continue;
    walks.push_back(walk);
    targets.push_back({walk, view_of(tensors[i], heads, h, is_double, "tensors", i), i / size_t(run)});
  }
  struct Item {
    int64_t first_entry;
    size_t target;
    int64_t head, first, count;
  };
  std::vector<Item> items;
  std::vector<int64_t> run_ends;  // in entries, of runs of targets that share no memory
  int64_t entries = 0, longest = 0;
  size_t from = 0;
  for (const size_t to : disjoint_runs(walks, {0})) {
    const int64_t start = entries;
    for (size_t t = from; t < to; ++t) {
      const int64_t columns = targets[t].view.columns(), most = std::max<int64_t>(16, std::min<int64_t>(kRun, (64 << 10) / h));
      // Short rows of many columns must stay runs of whole cache lines; a run that no cache holds costs nothing, since it is read once.
      const int64_t width = targets[t].view.row_step == 1 && targets[t].view.inner_step != 1 ? most : kRun;
      for (int64_t first = 0; first < columns; first += width)
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t count = std::min(width, columns - first);
          items.push_back({entries, t, head, first, count});
          entries += count * h;
        }
    }
    run_ends.push_back(entries);
    longest = std::max(longest, entries - start);
    from = to;
  }
  const ThreadScratch scratch(8 * std::max(kRun, h), chunks_of(longest, kEntriesWorthAThread));
  int64_t start = 0;
  for (const int64_t run_end : run_ends) {
    parallel_for(run_end - start, kEntriesWorthAThread, scratch, [&](int64_t begin, int64_t end, void* aside) {
      auto before = [](const Item& item, int64_t entry) { return item.first_entry < entry; };
      auto item = std::lower_bound(items.begin(), items.end(), start + begin, before);
      for (; item != items.end() && item->first_entry < start + end; ++item) {
        const Target& target = targets[item->target];
        const int64_t row = int64_t(target.joint) * heads + item->head;
        auto call = [&](auto bits) {
          permute<decltype(bits)>(target.view, item->head, item->first, item->count, rows + row * h, moves[row], h, aside);
        };
        const int64_t size = element_size(target.view.storage);
        if (size == 8) call(uint64_t{});
        else if (size == 4) call(uint32_t{});
        else call(uint16_t{});
      }
    });
    start = run_end;
  }
}

}  // namespace teleport_fast
