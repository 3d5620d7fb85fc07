// grad_norm_objective for one instruction set: an inverse by elimination with pivots, two products, two inner products.
#include "grad_norm_objective.h"
#include "small_matrix.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

// In-place Gauss-Jordan elimination with partial pivoting; false where no pivot is left.
template <class T>
NOINLINE bool invert(T* a, int64_t h, int64_t ld, int64_t* pivots) {
  auto swap_rows = [&](int64_t i, int64_t k) {
    for (int64_t j = 0; j < ld; j += kLanes<T>) {
      const Vec<T> x = load(a + i * ld + j);
      store(load(a + k * ld + j), a + i * ld + j);
      store(x, a + k * ld + j);
    }
  };
  for (int64_t k = 0; k < h; ++k) {
    int64_t pivot = k;
    T largest = 0;
    for (int64_t i = k; i < h; ++i) {
      const T x = a[i * ld + k], size = x < 0 ? -x : x;
      if (size > largest || size != size) {
        largest = size;
        pivot = i;
      }
    }
    if (largest == 0) return false;
    pivots[k] = pivot;
    if (pivot != k) swap_rows(pivot, k);
    T* row = a + k * ld;
    const Vec<T> reciprocal = splat(T(1) / row[k]);
    row[k] = 1;
    for (int64_t j = 0; j < ld; j += kLanes<T>) store(reciprocal * load(row + j), row + j);
    for (int64_t i = 0; i < h; ++i) {
      if (i == k) continue;
      T* other = a + i * ld;
      const Vec<T> factor = splat(-other[k]);
      other[k] = 0;
      for (int64_t j = 0; j < ld; j += kLanes<T>) store(fma<T>(factor, load(row + j), load(other + j)), other + j);
    }
  }
  for (int64_t k = h; k-- > 0;) {
    if (pivots[k] == k) continue;
    for (int64_t i = 0; i < h; ++i) {
      const T x = a[i * ld + k];
      a[i * ld + k] = a[i * ld + pivots[k]];
      a[i * ld + pivots[k]] = x;
    }
  }
  return true;
}

// tr(W gram Wᵀ): the square norm of W times the gradient that `gram` is the Gram of.
template <class T>
NOINLINE double weigh(const T* W, const T* gram, T* product, int64_t h, int64_t ld) {
  multiply<T>(W, gram, nullptr, 0.0, product, {h, ld, false});
  // Compensated over rows: float64 has no wider type to add up h·lanes numbers in, and torch's own sum is pairwise.
  double sum = 0, lost = 0;
  for (int64_t i = 0; i < h; ++i) {
    Vec<T> row = {};
    for (int64_t j = 0; j < h; j += kLanes<T>) row = fma<T>(load(W + i * ld + j), load(product + i * ld + j), row);
    double lanes[kLanes<T>];
    for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = double(row[lane]);
    for (int half = kLanes<T> / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    const double term = lanes[0] - lost, next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  }
  return sum;
}

template <class T>
void objective(const ObjectiveItem& item) {
  const int64_t h = item.h, ld = row_length<T>(h);
  const T* g = static_cast<const T*>(item.g);
  T *W = static_cast<T*>(item.scratch), *gram = W + h * ld, *product = gram + h * ld;
  double sum = 0;
  if (item.gram_minus) {
    pad_rows(g, W, h, ld);
    pad_rows(static_cast<const T*>(item.gram_minus), gram, h, ld);
    sum += weigh(W, gram, product, h, ld);
  }
  if (item.minus_gram_plus) {
    // g⁻ᵀ, from gᵀ.
    for (int64_t i = 0; i < h; ++i) {
      for (int64_t j = 0; j < h; ++j) W[i * ld + j] = g[j * h + i];
      for (int64_t j = h; j < ld; ++j) W[i * ld + j] = 0;
    }
    // Bytes behind the three matrices: element sizes divide 8, rows are whole vectors.
    if (invert(W, h, ld, reinterpret_cast<int64_t*>(product + h * ld))) {
      pad_rows(static_cast<const T*>(item.minus_gram_plus), gram, h, ld);
      sum -= weigh(W, gram, product, h, ld);
    } else {
      sum = __builtin_inf();
    }
  }
  *static_cast<T*>(item.objective) = T(sum);
}

}  // namespace

void objective_item(const ObjectiveItem& item, bool is_double) {
  if (is_double) objective<double>(item);
  else objective<float>(item);
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
