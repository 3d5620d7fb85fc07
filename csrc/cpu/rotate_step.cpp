// rotate_step_ on the CPU: the matrices of all tensors and heads are cut into panels, which all threads share.
#include "rotate_step.h"

#include <algorithm>
#include <cmath>

#include "../ops.h"
#include "host.h"

namespace teleport_fast {
namespace {

// Entries of a panel: its two copies take 128 KB in float32, a quarter of a second-level cache.
constexpr int64_t kPanelEntries = 16 << 10;
// Least rows and columns of a panel: whole tiles of every instruction set, and enough of them to pay for reading the basis.
constexpr int64_t kLeastRows = 96, kLeastColumns = 64;

struct Panels {
  int64_t rows, columns, row_panels, column_panels;

  Panels(int64_t all_rows, int64_t all_columns, bool whole_rows, bool whole_columns) : rows(all_rows), columns(all_columns) {
    if (!whole_columns) columns = std::min(columns, std::max(kPanelEntries / std::min(rows, kPanelEntries) / 64 * 64, kLeastColumns));
    if (!whole_rows) rows = std::min(rows, std::max(kPanelEntries / std::min(columns, kPanelEntries) / 48 * 48, kLeastRows));
    row_panels = (all_rows + rows - 1) / rows;
    column_panels = (all_columns + columns - 1) / columns;
  }
};

// The pieces of one thread's scratch, where they stand in its memory.
struct Pieces {
  int64_t starts[10], bytes = 0;

  Pieces(const Panels& panels, int64_t rows, int64_t columns, bool row_basis, bool column_basis, int64_t element) {
    const int64_t panel = panels.rows * rotate_padded(panels.columns), strips = column_basis ? columns * rotate_padded(columns) : 0;
    const int64_t sizes[] = {
        panel, panel, row_basis ? rows * rows : 0, strips, strips, kRotateChunk * kRotateStrip, kRotateChunk * kRotateStrip,
        kRotateChunk * kRotateStrip, std::max(panels.rows, rotate_padded(panels.columns)), panels.rows * kRotateLanes};
    for (int i = 0; i < 10; ++i) {
      starts[i] = bytes;
      bytes += (sizes[i] * element + 63) / 64 * 64;
    }
  }

  RotateScratch in(void* memory) const {
    RotateScratch scratch{};
    void** places[] = {
        &scratch.panels[0], &scratch.panels[1], &scratch.row_basis_t, &scratch.column_strips[0], &scratch.column_strips[1],
        &scratch.chunks[0], &scratch.chunks[1], &scratch.chunks[2], &scratch.norms, &scratch.sums};
    for (int i = 0; i < 10; ++i) *places[i] = static_cast<char*>(memory) + starts[i];
    return scratch;
  }
};

// A tensor's view without a head, its columns in the order of their numbers.
struct Source {
  RotateOperand operand{};
  int64_t head_step, element;
};

Source source(const Tensor& tensor, int64_t heads, int64_t h, bool is_double, const char* name, size_t index) {
  const View view = view_of(tensor, heads, h, is_double, name, index);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  Source result;
  result.head_step = view.head_step;
  result.element = view.storage == Storage::Float64 ? 8 : view.storage == Storage::Float32 ? 4 : 2;
  RotateOperand& operand = result.operand;
  operand.data = view.data;
  operand.storage = view.storage;
  operand.row_step = view.row_step;
  operand.inner_step = strides[strides.size() - 1];
  operand.outer_step = sizes.size() == 4 ? strides[2] : 0;
  operand.flat = sizes.size() == 3 || sizes[2] == 1 || sizes[3] == 1 || operand.outer_step == sizes[3] * operand.inner_step;
  if (sizes.size() == 4 && sizes[3] == 1) operand.inner_step = operand.outer_step;
  return result;
}

RotateOperand of_head(const Source& source, int64_t head, bool transposed) {
  RotateOperand operand = source.operand;
  operand.data = static_cast<char*>(operand.data) + head * source.head_step * source.element;
  if (transposed) std::swap(operand.row_step, operand.inner_step);
  return operand;
}

void check_bases(const std::vector<Tensor>& bases, size_t count, int64_t dim, int64_t heads, int64_t width, bool is_double, const char* name) {
  STD_TORCH_CHECK(bases.empty() || bases.size() == count, "rotate_step_: ", name, " must be empty or one basis per parameter");
  for (const Tensor& basis : bases)
    STD_TORCH_CHECK(
        basis.is_cpu() && basis.is_contiguous() && basis.dim() == dim && (dim == 2 || basis.size(0) == heads) &&
            basis.size(dim - 1) == width && basis.size(dim - 2) == width &&
            basis.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
        "rotate_step_: a basis in ", name, " must be contiguous, of width ", width, ", on the CPU, of the accumulation dtype");
}

}  // namespace

void rotate_step_(
    std::vector<Tensor> parameters, std::vector<Tensor> gradients, std::vector<Tensor> first_moments, std::vector<Tensor> second_moments,
    std::vector<Tensor> left, std::vector<Tensor> right, int64_t base, double step, double lr, double beta1, double beta2, double eps,
    double weight_decay, bool nesterov) {
  const size_t count = parameters.size();
  STD_TORCH_CHECK(base >= 0 && base <= 2, "rotate_step_: base must be 0, 1 or 2");
  const BaseMap map = BaseMap(base);
  STD_TORCH_CHECK(
      count > 0 && gradients.size() == count && first_moments.size() == count && (map != BaseMap::Adam || second_moments.size() == count),
      "rotate_step_: the lists must be of one length");
  const auto sizes = parameters[0].sizes();
  STD_TORCH_CHECK(sizes.size() == 3 || sizes.size() == 4, "rotate_step_: parameters must have 3 or 4 dimensions");
  const int64_t heads = sizes[0], h = sizes[1], inner = sizes[sizes.size() - 1], n = sizes.size() == 4 ? sizes[2] * inner : inner;
  const bool is_double = parameters[0].scalar_type() == ScalarType::Double;
  check_bases(left, count, 3, heads, h, is_double, "left");
  check_bases(right, count, 2, heads, n, is_double, "right");
  const std::vector<Tensor>* lists[] = {&parameters, &gradients, &first_moments, &second_moments};
  const char* names[] = {"parameters", "gradients", "first_moments", "second_moments"};
  const int operands = map == BaseMap::Adam ? 4 : 3;
  std::vector<Source> sources[4];
  bool flat = true;
  for (int k = 0; k < operands; ++k)
    for (size_t i = 0; i < count; ++i) {
      const Tensor& tensor = (*lists[k])[i];
      STD_TORCH_CHECK(
          size_t(tensor.dim()) == sizes.size() && std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin()), "rotate_step_: ",
          names[k], "[", i, "] must have the shape of parameters[0]");
      sources[k].push_back(source(tensor, heads, h, is_double, names[k], i));
      flat = flat && sources[k].back().operand.flat;
    }
  if (heads == 0 || h == 0 || n == 0) return;

  // Vectors run along columns: where a view's rows are contiguous, as where a layer reads the joint, its transpose is stepped.
  const RotateOperand& like = sources[0][0].operand;
  const bool transposed = flat && like.row_step == 1 && like.inner_step != 1;
  const int64_t rows = transposed ? n : h, columns = transposed ? h : n, element = is_double ? 8 : 4;
  const bool norms = map == BaseMap::RowNorm;
  const bool turns_rows = !(transposed ? right : left).empty(), turns_columns = !(transposed ? left : right).empty();
  const Panels panels(rows, columns, turns_rows || (norms && transposed), turns_columns || (norms && !transposed));
  const bool adam = map == BaseMap::Adam;
  const RotateNumbers numbers{
      beta1, beta2, eps, 1 - lr * weight_decay, adam ? lr / (1 - std::pow(beta1, step + nesterov)) : lr,
      adam ? 1 / std::sqrt(1 - std::pow(beta2, step)) : 1, nesterov ? beta1 : 1, nesterov ? 1 - beta1 : 0};

  const auto kernel = select_rotate_item();
  const int64_t each = panels.row_panels * panels.column_panels, items = int64_t(count) * heads * each;
  const int64_t work = panels.rows * panels.columns * (16 + 2 * (turns_rows ? rows : 0) + 2 * (turns_columns ? columns : 0));
  const Pieces pieces(panels, rows, columns, turns_rows, turns_columns, element);
  parallel_for(items, std::max<int64_t>(1, kWorthAThread / work), pieces.bytes, [&](int64_t begin, int64_t end, void* memory) {
    RotateScratch scratch = pieces.in(memory);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at / each / heads, head = at / each % heads, panel = at % each;
      auto basis = [&](const std::vector<Tensor>& bases, bool is_left) -> const void* {
        if (bases.empty()) return nullptr;
        return static_cast<const char*>(bases[i].data_ptr()) + (is_left ? head * h * h * element : 0);
      };
      const void *l = basis(left, true), *r = basis(right, false);
      RotateItem item{};
      RotateOperand* places[] = {&item.parameter, &item.gradient, &item.first_moment, &item.second_moment};
      for (int k = 0; k < operands; ++k) *places[k] = of_head(sources[k][i], head, transposed);
      item.rows = rows;
      item.columns = columns;
      item.inner = transposed ? h : inner;
      item.first_row = panel / panels.column_panels * panels.rows;
      item.row_count = std::min(panels.rows, rows - item.first_row);
      item.first_column = panel % panels.column_panels * panels.columns;
      item.column_count = std::min(panels.columns, columns - item.first_column);
      item.row_basis = transposed ? r : l;
      item.column_basis = transposed ? l : r;
      item.base = map;
      item.norm_of_columns = transposed;
      item.numbers = numbers;
      item.scratch = &scratch;
      kernel(item, is_double);
    }
  });
}

}  // namespace teleport_fast
