// gram_difference for one instruction set: packs panels of columns and adds their symmetric products, lower half only; panels
// whose rows are contiguous go to gram_dots.h.
#include "gram_difference.h"
#include "gram_dots.h"
#include "gram_narrow.h"
#include "gram_runs.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

template <class T>
constexpr int64_t kPitch = kGramDepth * kStrip<T>;

template <class S, class T>
void pack_segment(const GramSegment& segment, int64_t head, int64_t ahead, int64_t h, T* to) {
  const View& view = *segment.view;
  for_runs(segment, head, [&](int64_t offset, int64_t, int64_t run) {
    const S* from = static_cast<const S*>(view.data) + offset;
    pack_strips(from, view.row_step, view.inner_step, h, run, to, kPitch<T>, ahead);
    to += run * kStrip<T>;
  });
}

void pack(const GramSegment& segment, int64_t head, int64_t ahead, int64_t h, float* to) {
  switch (segment.view->storage) {
    case Storage::BFloat16: return pack_segment<BFloat16>(segment, head, ahead, h, to);
    case Storage::Half: return pack_segment<Half>(segment, head, ahead, h, to);
    default: return pack_segment<float>(segment, head, ahead, h, to);
  }
}
void pack(const GramSegment& segment, int64_t head, int64_t ahead, int64_t h, double* to) {
  pack_segment<double>(segment, head, ahead, h, to);
}

// Rows of one strip against the first vectors of another: out[first + m] += sign * Σ_k rows[k][first + m] * strip[k].
template <class T, int Vectors>
struct Tile {
  const T *rows, *strip;
  int64_t depth;
  T sign, *out;
  int64_t out_step;

  template <int Rows>
  INLINE void run(int64_t first) const {
    Vec<T> sum[Rows][Vectors];
    multiply_tile<T, Rows, Vectors>(rows + first, 1, kStrip<T>, strip, depth, sum);
    for (int m = 0; m < Rows; ++m) {
      T* to = out + (first + m) * out_step;
      for (int v = 0; v < Vectors; ++v) store(fma<T>(splat(sign), sum[m][v], load(to + v * kLanes<T>)), to + v * kLanes<T>);
    }
  }
};

// Columns that lie a multiple of this many bytes apart share so few sets of the first-level cache that what is asked for early is
// gone when it is needed: asking during the product makes 12 heads of 64 1.2 times faster, 12 of 128 1.4 times slower.
constexpr int64_t kFewSets = 2048;

// Lines of memory, one a column, that will be packed next.
struct Ahead {
  const char* from;
  int64_t step, bytes;
};

// A whole strip against itself, without the upper right quarter: kDiagonalRows rows of the upper half, which need one vector, and as
// many of the lower half, which need two, make one tile of 12 accumulators (24 of AVX-512's 32 registers). Apart, the halves of 4
// have 8, too few to hide the latency. Meanwhile memory brings what is packed next: in the packing it would be waited for.
template <class T>
constexpr int kDiagonalRows = kLanes<T> < 4 ? kLanes<T> : kMaxRows < 8 ? 4 : 8;
template <class T>
void add_diagonal(const T* strip, int64_t depth, T sign, T* out, int64_t out_step, const Ahead& ahead) {
  constexpr int lanes = kLanes<T>, kRows = kDiagonalRows<T>;
  for (int first = 0; first < lanes; first += kRows) {
    const char* next = ahead.from + first / kRows * 64;
    Vec<T> upper[kRows] = {}, lower[kRows][2] = {};
    const T *columns = strip, *rows = strip + first;
    for (int64_t k = 0; k < depth; ++k, columns += kStrip<T>, rows += kStrip<T>, next += ahead.step) {
      __builtin_prefetch(next);
      const Vec<T> x[2] = {load(columns), load(columns + lanes)};
      for (int m = 0; m < kRows; ++m) {
        upper[m] = fma<T>(splat(rows[m]), x[0], upper[m]);
        const Vec<T> y = splat(rows[lanes + m]);
        for (int v = 0; v < 2; ++v) lower[m][v] = fma<T>(y, x[v], lower[m][v]);
      }
    }
    for (int m = 0; m < kRows; ++m) {
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

// How far in memory from a head's panel the one is that follows in time.
int64_t next_panel(const GramItem& item, const GramPanel& panel, const View& view, int64_t head) {
  if (!panel.heads_inside) return panel.depth * view.inner_step;
  return head + 1 < item.head_count ? view.head_step : panel.depth * view.inner_step - head * view.head_step;
}

// The lines that follow a panel whose columns are one run of a view with contiguous rows; of any other panel none.
Ahead ahead_of(const GramItem& item, const GramPanel& panel, int64_t head) {
  const GramSegment& segment = item.segments[panel.first_segment];
  const View& view = *segment.view;
  const int64_t inner = segment.first % view.inner;
  if (panel.end_segment - panel.first_segment > 1 || view.row_step != 1 || inner + segment.count > view.inner) return {};
  const int64_t bytes = view.storage == Storage::Float64 ? 8 : view.storage == Storage::Float32 ? 4 : 2;
  const int64_t at = (item.first_head + head) * view.head_step + segment.first / view.inner * view.outer_step + inner * view.inner_step;
  return {static_cast<const char*>(view.data) + (at + next_panel(item, panel, view, head)) * bytes, view.inner_step * bytes, bytes};
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
  const T sign = T(panel.sign);
  const Ahead next = ahead_of(item, panel, head);
  const bool spread = next.from && next.step % kFewSets && h % width == 0;
  for (int64_t s = panel.first_segment; s < panel.end_segment; ++s) {
    const GramSegment& segment = item.segments[s];
    const int64_t ahead = next_panel(item, panel, *segment.view, head);
    if (gram_narrow<T>(*segment.view, h)) {
      add_narrow(segment, item.first_head + head, ahead, h, sign, partial, ld);
    } else {
      pack(segment, item.first_head + head, spread ? 0 : ahead, h, to);
      to += segment.count * width;
    }
  }
  const int64_t depth = (to - packed) / width;
  if (!depth) return;
  for (int64_t i = 0; i < h; i += width) {
    const int64_t rows = h - i < width ? h - i : width;
    const T* strip = packed + i / width * kPitch<T>;
    T* out = partial + i * ld;
    for (int64_t j = 0; j < i; j += width)
      for_row_tiles(rows, Tile<T, 2>{strip, packed + j / width * kPitch<T>, depth, sign, out + j, ld});
    if (rows == width) {
      add_diagonal(strip, depth, sign, out + i, ld, spread ? Ahead{next.from + i * next.bytes, next.step, 0} : Ahead{reinterpret_cast<const char*>(packed), 0, 0});
    } else {
      // Without the upper right quarter, and without the second vector where it is empty.
      for_row_tiles<lanes>(rows < lanes ? rows : lanes, Tile<T, 1>{strip, strip, depth, sign, out + i, ld});
      if (rows > lanes) for_row_tiles(rows - lanes, Tile<T, 2>{strip + lanes, strip, depth, sign, out + lanes * ld + i, ld});
    }
    add_squares(strip, depth, squares + i);
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
