// gram_difference for one instruction set: packs panels of columns and adds their symmetric products, lower half only; panels
// whose rows are contiguous go to gram_dots.h.
#include "gram_difference.h"
#include "gram_dots.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

template <class T>
constexpr int64_t kPitch = kGramDepth * kStrip<T>;

template <class S, class T>
void pack_segment(const GramSegment& segment, int64_t head, bool head_next, int64_t h, T* to) {
  const View& view = *segment.view;
  const int64_t ahead = head_next ? view.head_step : kGramDepth * view.inner_step;
  int64_t column = segment.first, left = segment.count;
  while (left > 0) {
    const int64_t outer = column / view.inner, inner = column % view.inner;
    const int64_t run = left < view.inner - inner ? left : view.inner - inner;
    const S* from = static_cast<const S*>(view.data) + head * view.head_step + outer * view.outer_step + inner * view.inner_step;
    pack_strips(from, view.row_step, view.inner_step, h, run, to, kPitch<T>, ahead);
    to += run * kStrip<T>;
    column += run;
    left -= run;
  }
}

void pack(const GramSegment& segment, int64_t head, bool head_next, int64_t h, float* to) {
  switch (segment.view->storage) {
    case Storage::BFloat16: return pack_segment<BFloat16>(segment, head, head_next, h, to);
    case Storage::Half: return pack_segment<Half>(segment, head, head_next, h, to);
    default: return pack_segment<float>(segment, head, head_next, h, to);
  }
}
void pack(const GramSegment& segment, int64_t head, bool head_next, int64_t h, double* to) {
  pack_segment<double>(segment, head, head_next, h, to);
}

// Rows of one strip against another: out[first + m] += sign * Σ_k rows[k][first + m] * strip[k].
template <class T>
struct Tile {
  const T *rows, *strip;
  int64_t depth;
  T sign, *out;
  int64_t out_step;

  template <int Rows>
  INLINE void run(int64_t first) const {
    Vec<T> sum[Rows][2];
    multiply_tile<T, Rows, 2>(rows + first, 1, kStrip<T>, strip, depth, sum);
    for (int m = 0; m < Rows; ++m) {
      T* to = out + (first + m) * out_step;
      for (int v = 0; v < 2; ++v) store(fma<T>(splat(sign), sum[m][v], load(to + v * kLanes<T>)), to + v * kLanes<T>);
    }
  }
};

// A whole strip against itself, without the upper right quarter: kDiagonalRows rows of the upper half, which need one vector, and as
// many of the lower half, which need two, make one tile of 12 accumulators. Apart, the halves have 8, too few to hide the latency.
constexpr int kDiagonalRows = 4;
template <class T>
void add_diagonal(const T* strip, int64_t depth, T sign, T* out, int64_t out_step) {
  constexpr int lanes = kLanes<T>;
  for (int first = 0; first < lanes; first += kDiagonalRows) {
    Vec<T> upper[kDiagonalRows] = {}, lower[kDiagonalRows][2] = {};
    const T *columns = strip, *rows = strip + first;
    for (int64_t k = 0; k < depth; ++k, columns += kStrip<T>, rows += kStrip<T>) {
      const Vec<T> x[2] = {load(columns), load(columns + lanes)};
      for (int m = 0; m < kDiagonalRows; ++m) {
        upper[m] = fma<T>(splat(rows[m]), x[0], upper[m]);
        const Vec<T> y = splat(rows[lanes + m]);
        for (int v = 0; v < 2; ++v) lower[m][v] = fma<T>(y, x[v], lower[m][v]);
      }
    }
    for (int m = 0; m < kDiagonalRows; ++m) {
      T *above = out + (first + m) * out_step, *below = above + lanes * out_step;
      store(fma<T>(splat(sign), upper[m], load(above)), above);
      for (int v = 0; v < 2; ++v) store(fma<T>(splat(sign), lower[m][v], load(below + v * lanes)), below + v * lanes);
    }
  }
}

// squares[a] += Σ_k strip[k][a]². Read off the Gram's diagonal they would carry the error of its long sums, three times torch's;
// four short sums cost 2% of the product at a width of 64.
template <class T>
void add_squares(const T* strip, int64_t depth, T* squares) {
  Vec<T> sum[4][2] = {};
  auto add = [&](int64_t k, int to) {
    for (int v = 0; v < 2; ++v) {
      const Vec<T> x = load(strip + k * kStrip<T> + v * kLanes<T>);
      sum[to][v] = fma<T>(x, x, sum[to][v]);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4)
    for (int to = 0; to < 4; ++to) add(k + to, to);
  for (; k < depth; ++k) add(k, 0);
  for (int v = 0; v < 2; ++v)
    store(load(squares + v * kLanes<T>) + ((sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v])), squares + v * kLanes<T>);
}

// partial += sign * (one head's columns of a panel) * (the same)ᵀ, lower half.
template <class T>
void add_panel(const GramItem& item, const GramPanel& panel, int64_t head) {
  if (panel.dots) return add_dots<T>(item, panel, head);
  constexpr int width = kStrip<T>, lanes = kLanes<T>;
  const int64_t h = item.h, ld = gram_row_bytes(h, sizeof(T)) / int64_t(sizeof(T));
  T* packed = static_cast<T*>(item.scratch);
  T* partial = reinterpret_cast<T*>(item.partial + head * item.partial_step);
  T *squares = partial + h * ld, *to = packed;
  for (int64_t s = panel.first_segment; s < panel.end_segment; ++s) {
    pack(item.segments[s], item.first_head + head, panel.heads_inside && head + 1 < item.head_count, h, to);
    to += item.segments[s].count * width;
  }
  const T sign = T(panel.sign);
  for (int64_t i = 0; i < h; i += width) {
    const int64_t rows = h - i < width ? h - i : width;
    const T* strip = packed + i / width * kPitch<T>;
    T* out = partial + i * ld;
    for (int64_t j = 0; j < i; j += width)
      for_row_tiles(rows, Tile<T>{strip, packed + j / width * kPitch<T>, panel.depth, sign, out + j, ld});
    if (rows == width && lanes % kDiagonalRows == 0) {
      add_diagonal(strip, panel.depth, sign, out + i, ld);
    } else {
      for_row_tiles(rows, Tile<T>{strip, strip, panel.depth, sign, out + i, ld});
    }
    add_squares(strip, panel.depth, squares + i);
  }
}

template <class T>
void gram(const GramItem& item) {
  for (int64_t head = 0; head < item.head_count; ++head)
    std::memset(item.partial + head * item.partial_step, 0, size_t((item.h + 1) * gram_row_bytes(item.h, sizeof(T))));
  // Neighbours in memory follow each other in time: heads inside columns where rows are contiguous, otherwise columns inside heads.
  for (int64_t first = 0, end; first < item.panel_count; first = end) {
    const GramPanel* panels = item.panels;
    for (end = first; end < item.panel_count && panels[end].heads_inside == panels[first].heads_inside;) ++end;
    if (panels[first].heads_inside) {
      for (int64_t p = first; p < end; ++p)
        for (int64_t head = 0; head < item.head_count; ++head) add_panel<T>(item, panels[p], head);
    } else {
      for (int64_t head = 0; head < item.head_count; ++head)
        for (int64_t p = first; p < end; ++p) add_panel<T>(item, panels[p], head);
    }
  }
}

}  // namespace

void gram_item(const GramItem& item, bool is_double) {
  if (is_double) gram<double>(item);
  else gram<float>(item);
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
