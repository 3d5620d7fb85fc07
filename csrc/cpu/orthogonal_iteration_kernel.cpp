// orthogonal_iteration_ for one instruction set: the Householder reflectors of a panel of rows, and the factor T that joins them.
#include "orthogonal_iteration.h"
#include "square_root.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

template <class T>
INLINE T lane_sum(Vec<T> x) {
  T sum = 0;
  for (int l = 0; l < kLanes<T>; ++l) sum += x[l];
  return sum;
}

template <class T>
INLINE T root(T x) {
  return square_root<T>(splat(x))[0];
}

// to[m] = rows[m] · v for R rows `step` apart. What follows a row is zero.
template <class T, int R>
INLINE void dots(const T* rows, int64_t step, const T* v, int64_t length, T* to) {
  Vec<T> sum[R][2];
  for (int m = 0; m < R; ++m) sum[m][0] = sum[m][1] = Vec<T>{};
  int64_t k = 0;
  for (; k + kStrip<T> <= length; k += kStrip<T>)
    for (int u = 0; u < 2; ++u) {
      const Vec<T> x = load(v + k + u * kLanes<T>);
      for (int m = 0; m < R; ++m) sum[m][u] = fma<T>(x, load(rows + m * step + k + u * kLanes<T>), sum[m][u]);
    }
  for (; k < length; k += kLanes<T>) {
    const Vec<T> x = load(v + k);
    for (int m = 0; m < R; ++m) sum[m][0] = fma<T>(x, load(rows + m * step + k), sum[m][0]);
  }
  for (int m = 0; m < R; ++m) to[m] = lane_sum<T>(sum[m][0] + sum[m][1]);
}

// rows[m] -= (tau rows[m] · v) v.
template <class T, int R>
INLINE void reflect(T* rows, int64_t step, const T* v, T tau, int64_t length) {
  T factor[R];
  dots<T, R>(rows, step, v, length, factor);
  for (int m = 0; m < R; ++m) factor[m] *= -tau;
  for (int64_t k = 0; k < length; k += kLanes<T>) {
    const Vec<T> x = load(v + k);
    for (int m = 0; m < R; ++m) {
      T* at = rows + m * step + k;
      store(fma<T>(splat(factor[m]), x, load(at)), at);
    }
  }
}

template <class T>
void panel(const ReflectorPanel& p) {
  const int64_t rows = p.rows, step = p.step;
  T *X = static_cast<T*>(p.x), *V = static_cast<T*>(p.v), *t = static_cast<T*>(p.t), *signs = static_cast<T*>(p.signs);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t length = p.length - i;
    T *x = X + i * step + i, *v = V + i * step + i, below;
    const T alpha = x[0];
    x[0] = 0;
    dots<T, 1>(x, step, x, length, &below);
    T tau = 0, diagonal = alpha;
    v[0] = 1;
    if (below > 0) {
      diagonal = alpha < 0 ? root<T>(below + alpha * alpha) : -root<T>(below + alpha * alpha);
      tau = (diagonal - alpha) / diagonal;
      const T scale = 1 / (alpha - diagonal);
      for (int64_t k = 1; k < length; ++k) v[k] = x[k] * scale;
    }
    signs[i] = diagonal < 0 ? T(-1) : T(1);
    int64_t j = i + 1;
    for (; j + 4 <= rows; j += 4) reflect<T, 4>(X + j * step + i, step, v, tau, length);
    for (; j < rows; ++j) reflect<T, 1>(X + j * step + i, step, v, tau, length);
    // T's column i: -tau T (V v_iᵀ).
    T with[kPanelRows];
    for (int64_t m = 0; m < i; ++m) dots<T, 1>(V + m * step + i, step, v, length, with + m);
    for (int64_t m = 0; m < i; ++m) {
      T sum = 0;
      for (int64_t n = m; n < i; ++n) sum += t[m * kPanelRows + n] * with[n];
      t[m * kPanelRows + i] = -tau * sum;
    }
    t[i * kPanelRows + i] = tau;
    for (int64_t m = i + 1; m < kPanelRows; ++m) t[m * kPanelRows + i] = 0;
  }
}

}  // namespace

void reflect_panel(const ReflectorPanel& p, bool is_double) {
  if (is_double) panel<double>(p);
  else panel<float>(p);
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
