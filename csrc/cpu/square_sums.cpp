// square_sums on the CPU: blocks of all tensors are shared by all threads; a row's parts are then added in a fixed order.
#include "square_sums.h"

#include <tuple>

#include "../ops.h"
#include "cut.h"

namespace teleport_fast {
namespace {

// Of a block: 1,024 rows of sums are 16 KB, inside a first-level cache, and 3% of the 512 KB that they sum.
constexpr int64_t kBlockRows = 1024, kBlockEntries = 128 << 10, kLeastBlockEntries = 16 << 10;

// Where a block's sums stand among those of all blocks, and which rows of the result they belong to.
struct Part {
  int64_t first;
  int64_t row, sizes[2], row_steps[2];  // the slower and the faster axis of rows

  int64_t rows() const { return sizes[0] * sizes[1]; }
};

// Renumbers the rows of a block from 0, without gaps, the fastest axis first.
Part renumber(Block<1>& block, int64_t first) {
  Part part{first, block.row, {1, 1}, {0, 0}};
  int found = 1;
  int64_t step = 1;
  for (int d = 3; d >= 0; --d) {
    if (block.axes[d].row_step == 0) continue;
    part.sizes[found] = block.axes[d].size;
    part.row_steps[found--] = block.axes[d].row_step;
    block.axes[d].row_step = step;
    step *= block.axes[d].size;
  }
  block.row = 0;
  return part;
}

// Adds a part's sums to rows [begin, end) of `to`, which stands for row `begin`.
void add_part(const Part& part, const double* sums, int64_t begin, int64_t end, double* to, double* lost) {
  for (int64_t i = 0; i < part.sizes[0]; ++i, sums += part.sizes[1]) {
    const int64_t row = part.row + i * part.row_steps[0], step = part.row_steps[1];
    if (step == 1) {
      const int64_t last = std::min(end, row + part.sizes[1]);
      for (int64_t r = std::max(begin, row); r < last; ++r) add_exactly(sums[r - row], to[r - begin], lost[r - begin]);
    } else {
      for (int64_t j = 0; j < part.sizes[1]; ++j)
        if (const int64_t r = row + j * step; r >= begin && r < end) add_exactly(sums[j], to[r - begin], lost[r - begin]);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> square_sums(std::vector<Tensor> tensors, int64_t joints) {
  STD_TORCH_CHECK(!tensors.empty() && joints > 0 && tensors.size() % joints == 0, "square_sums: tensors must be ", joints, " equal runs");
  const int64_t heads = tensors[0].size(0), h = tensors[0].size(1), joint_rows = heads * h;
  const bool is_double = tensors[0].scalar_type() == ScalarType::Double;
  const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
  Tensor squares = torch::stable::new_empty(tensors[0], {joints * heads, h}, type);
  Tensor l1 = torch::stable::new_empty(tensors[0], {joints * heads, h}, type);

  std::vector<Walk<1>> walks;
  walks.reserve(tensors.size());
  int64_t entries = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor* operands[] = {&tensors[i]};
    const char* names[] = {"tensors"};
    walks.emplace_back(operands, heads, h, is_double, names, i);
    entries += walks.back().entries();
  }
  // A lone small tensor is shared too; the blocks must not depend on the threads, or the sums' order would.
  const int64_t budget = std::min(kBlockEntries, std::max(kLeastBlockEntries, entries / 64));
  std::vector<Part> parts;
  std::vector<int64_t> first_part, joint_first_part{0};
  int64_t sums = 0;
  const size_t run = tensors.size() / joints;
  for (size_t i = 0; i < walks.size(); ++i) {
    Walk<1>& walk = walks[i];
    walk.cut_into(budget, kBlockRows);
    first_part.push_back(int64_t(parts.size()));
    for (int64_t b = 0; b < walk.block_count(); ++b) {
      Block<1> block = walk.block(b);
      parts.push_back(renumber(block, sums));
      sums += 2 * parts.back().rows();
    }
    if ((i + 1) % run == 0) joint_first_part.push_back(int64_t(parts.size()));
  }
  const Scratch memory = allocate(sums * int64_t(sizeof(double)));
  double* all = static_cast<double*>(memory.get());
  const auto kernel = select_sums_item();
  for_each_block(walks, {walks.size()}, [&](size_t w, int64_t b) {
    double lost[2 * kBlockRows];
    SumsItem item{walks[w].block(b), walks[w].storage, {}, 0};
    renumber(item.block, 0);
    const Part& part = parts[first_part[w] + b];
    item.rows = part.rows();
    item.sums = {all + part.first, all + part.first + item.rows, lost, lost + kBlockRows};
    kernel(item);
    // Nothing is lost from an infinite sum, where the difference is NaN.
    for (int i = 0; is_double && i < 2; ++i)
      for (int64_t r = 0; r < item.rows; ++r)
        if (const double rest = lost[i * kBlockRows + r]; rest == rest) all[part.first + i * item.rows + r] += rest;
  });

  const int64_t rows = joints * joint_rows;
  const int64_t grain = std::max<int64_t>(64, kEntriesWorthAThread * rows / std::max<int64_t>(1, sums));
  const Scratch totals = allocate(4 * rows * int64_t(sizeof(double)));
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    double *square = static_cast<double*>(totals.get()) + 4 * begin, *absolute = square + count, *square_lost = absolute + count, *absolute_lost = square_lost + count;
    std::fill_n(square, 4 * count, 0.0);
    for (int64_t joint = begin / joint_rows; joint * joint_rows < end; ++joint) {
      const int64_t base = joint * joint_rows;
      for (int64_t p = joint_first_part[joint]; p < joint_first_part[joint + 1]; ++p) {
        Part part = parts[p];
        part.row += base;
        add_part(part, all + part.first, begin, end, square, square_lost);
        add_part(part, all + part.first + part.rows(), begin, end, absolute, absolute_lost);
      }
    }
    auto sum = [](double value, double lost) { return lost == lost ? value + lost : value; };
    auto write = [&](auto* to_squares, auto* to_l1) {
      for (int64_t r = begin; r < end; ++r) {
        to_squares[r] = static_cast<std::remove_pointer_t<decltype(to_squares)>>(sum(square[r - begin], square_lost[r - begin]));
        to_l1[r] = static_cast<std::remove_pointer_t<decltype(to_l1)>>(sum(absolute[r - begin], absolute_lost[r - begin]));
      }
    };
    if (is_double) write(squares.mutable_data_ptr<double>(), l1.mutable_data_ptr<double>());
    else write(squares.mutable_data_ptr<float>(), l1.mutable_data_ptr<float>());
  });
  return {squares, l1};
}

}  // namespace teleport_fast
