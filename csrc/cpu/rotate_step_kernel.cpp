// rotate_step_ for one instruction set: a panel is packed into strips, turned, stepped, turned back and taken off the parameter.
#include "rotate_step.h"
#include "turn.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

template <class T>
struct Numbers {
  T beta1, beta2, rest1, rest2, eps, keep, rate, scale, old, fresh;

  explicit INLINE Numbers(const RotateNumbers& n)
      : beta1(T(n.beta1)), beta2(T(n.beta2)), rest1(T(1 - n.beta1)), rest2(T(1 - n.beta2)), eps(T(n.eps)), keep(T(n.keep)),
        rate(T(n.rate)), scale(T(n.scale)), old(T(n.old)), fresh(T(n.fresh)) {}
};

// Calls f(strip, first row, rows) over pieces of a panel, all strips of the same rows together: their lines lie side by side.
template <class T, class F>
INLINE void for_chunks(const RotateItem& item, const F& f) {
  const int64_t strips = (item.column_count + kStrip<T> - 1) / kStrip<T>;
  for (int64_t row = 0; row < item.row_count; row += kRotateChunk)
    for (int64_t s = 0; s < strips; ++s) f(s, row, item.row_count - row < kRotateChunk ? item.row_count - row : kRotateChunk);
}

template <class T>
INLINE Vec<T> sign_of(Vec<T> x) {
  typedef decltype(x > x) Mask;
  const Vec<T> one = splat(T(1));
  const Mask above = x > T(0), below = x < T(0);
  return (Vec<T>)((Mask)one & above) - (Vec<T>)((Mask)one & below);
}

// The turned gradient in `panel` becomes U, the moments take it up where they lie.
template <class T>
void base_map(const RotateItem& item, T* panel) {
  constexpr int lanes = kLanes<T>;
  const Numbers<T> n(item.numbers);
  const RotateScratch& scratch = *item.scratch;
  const BaseMap base = item.base;
  Vec<T>* sums = static_cast<Vec<T>*>(scratch.sums);
  const bool rows_normed = base == BaseMap::RowNorm && !item.norm_of_columns;
  T* norms = static_cast<T*>(scratch.norms);
  if (rows_normed)
    for (int64_t i = 0; i < item.row_count; ++i) sums[i] = Vec<T>{};
  else if (base == BaseMap::RowNorm)
    for (int64_t j = 0; j < rotate_padded(item.column_count); ++j) norms[j] = 0;
  for_chunks<T>(item, [&](int64_t s, int64_t row, int64_t rows) {
    T* x = panel + (s * item.row_count + row) * kStrip<T>;
    Chunk<T> first(item, item.first_moment, s, row, rows, scratch.chunks[0]);
    if (base == BaseMap::Adam) {
      Chunk<T> second(item, item.second_moment, s, row, rows, scratch.chunks[1]);
      for (int64_t i = 0; i < rows; ++i)
        for (int at = 0; at < kStrip<T>; at += lanes) {
          const Vec<T> g = load(x + i * kStrip<T> + at);
          const Vec<T> m = fma<T>(splat(n.rest1), g, first.at(i, at) * n.beta1);
          const Vec<T> v = fma<T>(splat(n.rest2) * g, g, second.at(i, at) * n.beta2);
          first.put(m, i, at);
          second.put(v, i, at);
          const Vec<T> u = fma<T>(splat(n.fresh), g, m * n.old);
          store(u / fma<T>(square_root<T>(v), splat(n.scale), splat(n.eps)), x + i * kStrip<T> + at);
        }
      second.write(item, item.second_moment, s, row, rows);
    } else {
      Vec<T> down[2] = {};
      for (int64_t i = 0; i < rows; ++i)
        for (int k = 0; k < 2; ++k) {
          const Vec<T> g = load(x + i * kStrip<T> + k * lanes);
          const Vec<T> m = fma<T>(splat(n.rest1), g, first.at(i, k * lanes) * n.beta1);
          first.put(m, i, k * lanes);
          const Vec<T> u = fma<T>(splat(n.fresh), g, m * n.old);
          if (rows_normed) sums[row + i] = fma<T>(u, u, sums[row + i]);
          else down[k] = fma<T>(u, u, down[k]);
          store(base == BaseMap::Sign ? sign_of<T>(u) : u, x + i * kStrip<T> + k * lanes);
        }
      if (base == BaseMap::RowNorm && !rows_normed)
        for (int k = 0; k < 2; ++k) {
          T* norm = norms + s * kStrip<T> + k * lanes;
          store(load(norm) + down[k], norm);
        }
    }
    first.write(item, item.first_moment, s, row, rows);
  });
  if (base != BaseMap::RowNorm) return;
  const T count = T(rows_normed ? item.columns : item.rows);
  if (rows_normed)
    for (int64_t i = 0; i < item.row_count; ++i) {
      norms[i] = 0;
      for (int l = 0; l < lanes; ++l) norms[i] += sums[i][l];
    }
  const int64_t entries = rows_normed ? item.row_count : item.column_count;
  for (int64_t i = 0; i < entries; ++i) norms[i] = square_root<T>(splat(norms[i] / count))[0] + n.eps;
  for_chunks<T>(item, [&](int64_t s, int64_t row, int64_t rows) {
    T* x = panel + (s * item.row_count + row) * kStrip<T>;
    for (int64_t i = 0; i < rows; ++i)
      for (int at = 0; at < kStrip<T>; at += lanes) {
        T* place = x + i * kStrip<T> + at;
        store(load(place) / (rows_normed ? splat(norms[row + i]) : load(norms + s * kStrip<T> + at)), place);
      }
  });
}

template <class T>
void update(const RotateItem& item, const T* panel) {
  const Numbers<T> n(item.numbers);
  for_chunks<T>(item, [&](int64_t s, int64_t row, int64_t rows) {
    const T* x = panel + (s * item.row_count + row) * kStrip<T>;
    Chunk<T> parameter(item, item.parameter, s, row, rows, item.scratch->chunks[2]);
    for (int64_t i = 0; i < rows; ++i)
      for (int at = 0; at < kStrip<T>; at += kLanes<T>)
        parameter.put(fma<T>(splat(-n.rate), load(x + i * kStrip<T> + at), parameter.at(i, at) * n.keep), i, at);
    parameter.write(item, item.parameter, s, row, rows);
  });
}

template <class T>
void step(const RotateItem& item) {
  RotateScratch& scratch = *item.scratch;
  T *x = static_cast<T*>(scratch.panels[0]), *spare = static_cast<T*>(scratch.panels[1]);
  auto swap = [&] {
    T* other = x;
    x = spare;
    spare = other;
  };
  pack_bases<T>(item);
  load_strips<T>(item, item.gradient, 0, 0, item.row_count, item.column_count, x);
  ask_for(item, item.first_moment);
  if (item.base == BaseMap::Adam) ask_for(item, item.second_moment);
  if (item.row_basis) {
    turn_rows<T>(item, static_cast<const T*>(item.row_basis), x, spare);
    swap();
  }
  if (item.column_basis) {
    turn_columns<T>(item, static_cast<const T*>(scratch.column_strips[0]), x, spare);
    swap();
  }
  base_map<T>(item, x);
  ask_for(item, item.parameter);
  if (item.column_basis) {
    turn_columns<T>(item, static_cast<const T*>(scratch.column_strips[1]), x, spare);
    swap();
  }
  if (item.row_basis) {
    turn_rows<T>(item, static_cast<const T*>(scratch.row_basis_t), x, spare);
    swap();
  }
  update<T>(item, x);
}

}  // namespace

void rotate_item(const RotateItem& item, bool is_double) {
  if (is_double) step<double>(item);
  else step<float>(item);
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
