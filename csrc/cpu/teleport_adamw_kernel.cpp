// teleport_adamw_ for one instruction set: a block's entries are moved and stepped in registers, read once and written once.
#include "square_root.h"
#include "teleport_adamw.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

template <class T>
struct Numbers {
  T shift, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, keep, rate, scale;

  explicit INLINE Numbers(const AdamwItem& item)
      : shift(T(item.shift)), beta1(T(item.step.beta1)), beta2(T(item.step.beta2)), one_minus_beta1(T(1 - item.step.beta1)),
        one_minus_beta2(T(1 - item.step.beta2)), eps(T(item.step.eps)), keep(T(item.step.keep)), rate(T(item.step.rate)),
        scale(T(item.step.scale)) {}
};

template <class T, bool Shifted>
INLINE void step(Vec<T>& p, Vec<T> g, Vec<T>& m, Vec<T>& v, Vec<T> parameter_factor, Vec<T> gradient_factor, const Numbers<T>& n) {
  // (p + c) f - c as p f + c (f - 1): small p are not lost in the sum.
  if constexpr (Shifted) p = fma<T>(p, parameter_factor, (parameter_factor - T(1)) * n.shift) * n.keep;
  else p *= parameter_factor * n.keep;
  g *= gradient_factor;
  m = fma<T>(splat(n.one_minus_beta1), g, m * (gradient_factor * n.beta1));
  v = fma<T>(splat(n.one_minus_beta2) * g, g, v * (gradient_factor * gradient_factor * n.beta2));
  p -= n.rate * m / fma<T>(square_root<T>(v), splat(n.scale), splat(n.eps));
}

// Fewer than a whole vector, or no contiguous ones: through a vector whose other lanes are idle.
template <class S, class T, bool Shifted>
NOINLINE void step_few(S* const (&x)[4], const Axis<4>& axis, int64_t i, const T* parameter_factors, const T* gradient_factors, const Numbers<T>& n) {
  constexpr int lanes = kLanes<T>;
  for (int count; i < axis.size; i += count) {
    count = int(axis.size - i < lanes ? axis.size - i : lanes);
    T entries[4][lanes] = {}, factors[2][lanes] = {};
    for (int l = 0; l < count; ++l) {
      for (int t = 0; t < 4; ++t) entries[t][l] = widen(x[t][(i + l) * axis.steps[t]]);
      factors[0][l] = parameter_factors[(i + l) * axis.row_step];
      factors[1][l] = gradient_factors[(i + l) * axis.row_step];
    }
    Vec<T> p = load(entries[0]), m = load(entries[2]), v = load(entries[3]);
    step<T, Shifted>(p, load(entries[1]), m, v, load(factors[0]), load(factors[1]), n);
    store(p, entries[0]);
    store(m, entries[2]);
    store(v, entries[3]);
    for (int t = 0; t < 4; ++t)
      if (t != 1)
        for (int l = 0; l < count; ++l) narrow(entries[t][l], x[t] + (i + l) * axis.steps[t]);
  }
}

// Bytes ahead that are asked for: four streams at once are more than the hardware follows well, by 4% of the whole.
constexpr int64_t kAhead = 512;

// Whole vectors of contiguous entries: of one row (Lanes false), or one of each row. Answers how many entries it took.
template <class S, class T, bool Shifted, bool Lanes>
INLINE int64_t step_vectors(S* const (&x)[4], int64_t count, const T* parameter_factors, const T* gradient_factors, const Numbers<T>& n) {
  constexpr int lanes = kLanes<T>;
  S *parameter = x[0], *first = x[2], *second = x[3];
  const S *p_from = parameter, *g_from = x[1], *m_from = first, *v_from = second;  // where load() knows the storage
  Vec<T> parameter_factor = splat(*parameter_factors), gradient_factor = splat(*gradient_factors);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    if constexpr (Lanes) {
      parameter_factor = load(parameter_factors + i);
      gradient_factor = load(gradient_factors + i);
    }
    if (i * int64_t(sizeof(S)) % 64 == 0)
      for (int t = 0; t < 4; ++t) __builtin_prefetch(x[t] + i + kAhead / int64_t(sizeof(S)));
    Vec<T> p = load(p_from + i), m = load(m_from + i), v = load(v_from + i);
    step<T, Shifted>(p, load(g_from + i), m, v, parameter_factor, gradient_factor, n);
    store(p, parameter + i);
    store(m, first + i);
    store(v, second + i);
  }
  return i;
}

template <class S, class T, bool Shifted>
INLINE void step_run(S* const (&x)[4], const Axis<4>& axis, const T* parameter_factors, const T* gradient_factors, const Numbers<T>& n) {
  const bool contiguous = axis.steps[0] == 1 && axis.steps[1] == 1 && axis.steps[2] == 1 && axis.steps[3] == 1;
  int64_t i = 0;
  if (contiguous && axis.row_step == 0) i = step_vectors<S, T, Shifted, false>(x, axis.size, parameter_factors, gradient_factors, n);
  else if (contiguous && axis.row_step == 1) i = step_vectors<S, T, Shifted, true>(x, axis.size, parameter_factors, gradient_factors, n);
  if (i < axis.size) step_few<S, T, Shifted>(x, axis, i, parameter_factors, gradient_factors, n);
}

// Fewer contiguous columns of a row, or fewer contiguous rows, are stepped as if all entries were rows.
constexpr int64_t kShortRun = 32, kFoldedLanes = 1024;

// Whether two axes are one run of memory in all four tensors.
INLINE bool side_by_side(const Axis<4>& slow, const Axis<4>& fast) {
  for (int t = 0; t < 4; ++t)
    if (fast.steps[t] != 1 || slow.steps[t] != fast.size) return false;
  return true;
}

// The two fastest axes, side by side, the fastest one short: either may be the rows.
template <class S, class T, bool Shifted>
void step_folded(S* const (&x)[4], const Axis<4>& slow, const Axis<4>& fast, const T* parameter_factors, const T* gradient_factors, const Numbers<T>& n) {
  T spread[2][kFoldedLanes];
  const int64_t entries = slow.size * fast.size, lanes = kFoldedLanes / fast.size * fast.size;
  for (int64_t first = 0; first < entries; first += lanes) {
    const int64_t count = entries - first < lanes ? entries - first : lanes;
    // Where the rows are the fast axis, every part begins with row 0.
    if (first == 0 || slow.row_step != 0) {
      int64_t row = first / fast.size * slow.row_step;
      for (int64_t i = 0; i < count; row += slow.row_step)
        for (int64_t k = 0; k < fast.size; ++k, ++i) {
          spread[0][i] = parameter_factors[row + k * fast.row_step];
          spread[1][i] = gradient_factors[row + k * fast.row_step];
        }
    }
    S* const from[4] = {x[0] + first, x[1] + first, x[2] + first, x[3] + first};
    step_run<S, T, Shifted>(from, Axis<4>{count, 1, {1, 1, 1, 1}}, spread[0], spread[1], n);
  }
}

template <class S, class T, bool Shifted>
void step_block(const AdamwItem& item) {
  const Block<4>& block = item.block;
  const Axis<4>* axes = block.axes;
  const Numbers<T> numbers(item);
  const T *parameter_factors = static_cast<const T*>(item.parameter_factors), *gradient_factors = static_cast<const T*>(item.gradient_factors);
  const bool folds = axes[3].size < kShortRun && side_by_side(axes[2], axes[3]);
  for (int64_t i = 0; i < axes[0].size; ++i)
    for (int64_t j = 0; j < axes[1].size; ++j)
      for (int64_t k = 0; k < (folds ? 1 : axes[2].size); ++k) {
        const int64_t row = block.row + i * axes[0].row_step + j * axes[1].row_step + k * axes[2].row_step;
        S* x[4];
        for (int t = 0; t < 4; ++t)
          x[t] = static_cast<S*>(block.data[t]) + i * axes[0].steps[t] + j * axes[1].steps[t] + k * axes[2].steps[t];
        if (folds) step_folded<S, T, Shifted>(x, axes[2], axes[3], parameter_factors + row, gradient_factors + row, numbers);
        else step_run<S, T, Shifted>(x, axes[3], parameter_factors + row, gradient_factors + row, numbers);
      }
}

template <class S, class T>
void step_item(const AdamwItem& item) {
  if (item.shift != 0) step_block<S, T, true>(item);
  else step_block<S, T, false>(item);
}

}  // namespace

void adamw_item(const AdamwItem& item) {
  switch (item.storage) {
    case Storage::Float64: return step_item<double, double>(item);
    case Storage::BFloat16: return step_item<BFloat16, float>(item);
    case Storage::Half: return step_item<Half, float>(item);
    default: return step_item<float, float>(item);
  }
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
