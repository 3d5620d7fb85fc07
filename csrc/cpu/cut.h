// Cuts many strided tensors into blocks of about one size, in the order of memory, and shares them among all threads.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "block.h"
#include "host.h"

namespace teleport_fast {

// Entries that take as long to stream as waking a thread.
constexpr int64_t kEntriesWorthAThread = 32'768;

inline int64_t element_size(Storage storage) { return storage == Storage::Float64 ? 8 : storage == Storage::Float32 ? 4 : 2; }

// Tensors of one shape (heads, h, ...) and one storage, walked together in the order of the first one's memory.
template <int Operands>
struct Walk {
  Storage storage;
  char* data[Operands];
  Axis<Operands> axes[4];
  int64_t cut[4], blocks[4];  // a block's size and their number along each axis

  int64_t entries() const { return axes[0].size * axes[1].size * axes[2].size * axes[3].size; }
  int64_t block_count() const { return blocks[0] * blocks[1] * blocks[2] * blocks[3]; }

  Walk(const Tensor* (&tensors)[Operands], int64_t heads, int64_t h, bool is_double, const char* (&names)[Operands], size_t index) {
    for (int t = 0; t < Operands; ++t) {
      const View view = view_of(*tensors[t], heads, h, is_double, names[t], index);
      STD_TORCH_CHECK(t == 0 || view.storage == storage, names[t], "[", index, "] and ", names[0], "[", index, "] differ in dtype");
      storage = view.storage;
      data[t] = static_cast<char*>(view.data);
    }
    const auto sizes = tensors[0]->sizes();
    std::vector<Axis<Operands>> order;
    for (size_t d = 0; d < sizes.size(); ++d) {
      Axis<Operands> axis{sizes[d], d == 0 ? h : d == 1 ? 1 : 0, {}};
      for (int t = 0; t < Operands; ++t) {
        STD_TORCH_CHECK(
            tensors[t]->sizes().size() == sizes.size() && tensors[t]->size(d) == sizes[d], names[t], "[", index, "] and ", names[0], "[",
            index, "] differ in shape");
        axis.steps[t] = tensors[t]->stride(d);
      }
      if (axis.size != 1) order.push_back(axis);
    }
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.steps[0] > b.steps[0]; });
    std::vector<Axis<Operands>> merged;
    for (const auto& axis : order) {
      bool fits = !merged.empty() && merged.back().row_step == axis.row_step * axis.size;
      for (int t = 0; fits && t < Operands; ++t) fits = merged.back().steps[t] == axis.steps[t] * axis.size;
      if (fits) {
        const int64_t size = merged.back().size * axis.size;
        merged.back() = axis;
        merged.back().size = size;
      } else {
        merged.push_back(axis);
      }
    }
    std::fill_n(axes, 4, Axis<Operands>{1, 0, {}});
    std::copy(merged.begin(), merged.end(), axes + 4 - merged.size());
  }

  // Blocks of at most about `entries` entries, long along fast axes, and of at most about `rows` rows.
  void cut_into(int64_t entries, int64_t rows) {
    for (int d = 3; d >= 0; --d) {
      const bool along_rows = axes[d].row_step != 0;
      const int64_t most = std::max<int64_t>(1, along_rows ? std::min(entries, rows) : entries);
      blocks[d] = std::max<int64_t>(1, (axes[d].size + most - 1) / most);
      cut[d] = (axes[d].size + blocks[d] - 1) / blocks[d];
      // Whole vectors, whole cache lines.
      if (blocks[d] > 1 && cut[d] > 16) cut[d] = std::min(most, (cut[d] + 15) / 16 * 16);
      blocks[d] = cut[d] ? (axes[d].size + cut[d] - 1) / cut[d] : 0;
      entries /= std::max<int64_t>(1, cut[d]);
      if (along_rows) rows /= std::max<int64_t>(1, cut[d]);
    }
  }

  Block<Operands> block(int64_t index) const {
    Block<Operands> block;
    std::copy_n(data, Operands, block.data);
    block.row = 0;
    for (int d = 3; d >= 0; --d) {
      const int64_t first = index % blocks[d] * cut[d];
      index /= blocks[d];
      block.axes[d] = axes[d];
      block.axes[d].size = std::min(cut[d], axes[d].size - first);
      block.row += first * axes[d].row_step;
      for (int t = 0; t < Operands; ++t)
        block.data[t] = static_cast<char*>(block.data[t]) + first * axes[d].steps[t] * element_size(storage);
    }
    return block;
  }

  // The bytes of one operand between its first and its last entry.
  std::pair<char*, char*> span(int operand) const {
    int64_t last = 0;
    for (const auto& axis : axes) last += (axis.size - 1) * axis.steps[operand];
    return {data[operand], data[operand] + (last + 1) * element_size(storage)};
  }
};

// Calls f(walk's number, block's number in it) for all blocks, equal shares of entries to a thread, one run of walks after the other;
// `ends` are the runs' ends.
template <int Operands, class F>
void for_each_block(const std::vector<Walk<Operands>>& walks, const std::vector<size_t>& ends, const F& f) {
  struct Item {
    int64_t first_entry;
    size_t walk;
    int64_t block;
  };
  std::vector<Item> items;
  int64_t entries = 0;
  for (size_t w = 0; w < walks.size(); ++w) {
    const int64_t count = walks[w].block_count(), all = walks[w].entries();
    for (int64_t b = 0; b < count; ++b) items.push_back({entries + all * b / count, w, b});
    entries += all;
  }
  auto item_at = [&](int64_t entry) {
    auto before = [](const Item& item, int64_t entry) { return item.first_entry < entry; };
    return std::lower_bound(items.begin(), items.end(), entry, before);
  };
  size_t from = 0;
  int64_t first = 0;
  for (const size_t to : ends) {
    int64_t count = 0;
    for (; from < to; ++from) count += walks[from].entries();
    parallel_for(count, kEntriesWorthAThread, [&](int64_t begin, int64_t end) {
      for (auto item = item_at(first + begin); item != items.end() && item->first_entry < first + end; ++item) f(item->walk, item->block);
    });
    first += count;
  }
}

// Ends of runs of walks that share no memory: two views of one memory must move one after the other. Views that only interlace
// count as sharing, and lose some speed so.
template <int Operands>
std::vector<size_t> disjoint_runs(const std::vector<Walk<Operands>>& walks, std::initializer_list<int> written) {
  std::vector<std::pair<char*, char*>> spans;
  for (const auto& walk : walks)
    for (int t : written) spans.push_back(walk.span(t));
  auto sorted = spans;
  std::sort(sorted.begin(), sorted.end());
  bool any = false;
  for (size_t i = 1; i < sorted.size() && !any; ++i) any = sorted[i].first < sorted[i - 1].second;
  std::vector<size_t> ends;
  const size_t each = written.size();
  for (size_t w = 1, from = 0; any && w < walks.size(); ++w) {
    bool meets = false;
    for (size_t a = from * each; a < w * each && !meets; ++a)
      for (size_t b = w * each; b < (w + 1) * each; ++b) meets = meets || (spans[a].first < spans[b].second && spans[b].first < spans[a].second);
    if (meets) ends.push_back(from = w);
  }
  ends.push_back(walks.size());
  return ends;
}

}  // namespace teleport_fast
