// group_action_ for one instruction set: a panel of columns is packed, multiplied by g and written back where it came from.
#include "group_action.h"
#include "strip_tile.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

// Columns ahead that along_rows asks for: far enough to hide a third-level cache's latency, near enough to stay in the first.
constexpr int64_t kPrefetch = 12;

// A StripTile's product, `count` <= kStrip wide and lane_step apart: through `spare`, (rows, kStrip), for what is no whole contiguous strip.
template <class S, class T>
NOINLINE void multiply_strip(const T* rows, int64_t row_count, const T* strip, int64_t depth, S* to, int64_t row_step, int64_t lane_step, int64_t count, T* spare) {
  if (lane_step == 1 && count == kStrip<T>) return for_row_tiles(row_count, StripTile<S, T>{rows, strip, depth, to, row_step});
  for_row_tiles(row_count, StripTile<T, T>{rows, strip, depth, spare, kStrip<T>});
  for (int64_t m = 0; m < row_count; ++m)
    for (int64_t v = 0; v < count; ++v) narrow(spare[m * kStrip<T> + v], to + m * row_step + v * lane_step);
}

// Columns are contiguous, or nothing is: vectors run along the columns, g's entries are broadcast.
template <class S, class T>
void along_columns(const ActionItem& item, S* panel, int64_t count, T* strips, T* spare) {
  const View& view = *item.view;
  const int64_t h = item.h;
  pack_strips(panel, view.inner_step, view.row_step, count, h, strips, h * kStrip<T>, kActionColumns * view.inner_step);
  for (int64_t c = 0; c < count; c += kStrip<T>, strips += h * kStrip<T>) {
    const int64_t width = count - c < kStrip<T> ? count - c : kStrip<T>;
    multiply_strip(static_cast<const T*>(item.g), h, strips, h, panel + c * view.inner_step, view.row_step, view.inner_step, width, spare);
  }
}

// Rows are contiguous: vectors run along the rows of gᵀ, packed once per item into `strips`, the panel's entries are broadcast.
template <class S, class T>
void along_rows(const ActionItem& item, S* panel, int64_t count, const T* strips, T* columns, T* spare) {
  const View& view = *item.view;
  const int64_t h = item.h, whole = h / kLanes<T> * kLanes<T>;
  for (int64_t c = 0; c < count; ++c) {
    const S* from = panel + c * view.inner_step;
    T* to = columns + c * h;
    prefetch_row(from + kPrefetch * view.inner_step, h);
    for (int64_t i = 0; i < whole; i += kLanes<T>) store(load(from + i), to + i);
    for (int64_t i = whole; i < h; ++i) to[i] = widen(from[i]);
  }
  for (int64_t i = 0; i < h; i += kStrip<T>, strips += h * kStrip<T>) {
    const int64_t width = h - i < kStrip<T> ? h - i : kStrip<T>;
    multiply_strip(columns, count, strips, h, panel + i, view.inner_step, 1, width, spare);
  }
}

template <class S, class T>
void act(const ActionItem& item) {
  const View& view = *item.view;
  const int64_t h = item.h;
  const bool rows_contiguous = view.row_step == 1 && (view.inner_step != 1 || view.inner == 1);
  T* strips = static_cast<T*>(item.scratch);
  const int64_t padded = (h + kStrip<T> - 1) / kStrip<T> * kStrip<T>;
  const int64_t longest = h > kActionColumns ? h : kActionColumns;
  T* spare = strips + h * (rows_contiguous ? padded : kActionColumns);
  T* columns = spare + kStrip<T> * longest;
  if (rows_contiguous) pack_strips(static_cast<const T*>(item.g), h, 1, h, h, strips, h * kStrip<T>, 0);
  int64_t column = item.first;
  for (int64_t left = item.count; left > 0;) {
    const int64_t outer = column / view.inner, inner = column % view.inner;
    int64_t run = left < view.inner - inner ? left : view.inner - inner;
    if (run > kActionColumns) run = kActionColumns;
    S* panel = static_cast<S*>(view.data) + item.head * view.head_step + outer * view.outer_step + inner * view.inner_step;
    if (rows_contiguous) along_rows<S, T>(item, panel, run, strips, columns, spare);
    else along_columns<S, T>(item, panel, run, strips, spare);
    column += run;
    left -= run;
  }
}

}  // namespace

void action_item(const ActionItem& item, bool is_double) {
  if (is_double) return act<double, double>(item);
  switch (item.view->storage) {
    case Storage::BFloat16: return act<BFloat16, float>(item);
    case Storage::Half: return act<Half, float>(item);
    default: return act<float, float>(item);
  }
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
