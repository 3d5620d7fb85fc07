// gram_difference: the work items that its host side hands to the kernel of one instruction set.
#pragma once

#include "isa.h"
#include "storage.h"

namespace teleport_fast {

// Most columns of a panel: two strips of two AVX2 vectors, 24 KB together, stay in a first-level cache of 32 KB.
constexpr int64_t kGramDepth = 192;
// Most bytes of a row, where a panel's rows are copied as they are, and their distance.
constexpr int64_t kGramDotBytes = 1024, kGramDotPitch = kGramDotBytes + 64;
// Runs of columns from which on rows are copied, not transposed.
constexpr int64_t kGramDotRun = 64;

// Whether a view's columns are contiguous: then its Gram is of dot products, with the lanes along the columns.
inline bool gram_dots(const View& view) { return view.inner_step == 1 && view.row_step != 1 && view.inner >= kGramDotRun; }

// Columns of a view's panels. Elsewhere it is the length of a running sum: as long as the error stays at torch's own, whose sums
// grow with the number of columns too (192 terms: 1.0 times its error for 1,000 columns, 2.2 times for 128). Dot products have
// a sum in every lane.
inline int64_t gram_depth(const View& view, int64_t columns) {
  if (gram_dots(view)) return kGramDotBytes / (view.storage == Storage::Float64 ? 8 : 4);
  return columns <= 192 ? 32 : columns <= 600 ? 96 : kGramDepth;
}
// Rows of a panel and of a partial sum are padded to the widest strip of any instruction set.
inline int64_t gram_row_bytes(int64_t h, int64_t element) { return (h > 0 ? h * element + 127 : 128) / 128 * 128; }
// Memory for one panel, of either kind.
inline int64_t gram_scratch_bytes(int64_t h, int64_t element) {
  const int64_t strips = gram_row_bytes(h, element) * kGramDepth, dots = h * kGramDotPitch;
  return strips > dots ? strips : dots;
}

// A run of columns of one view.
struct GramSegment {
  const View* view;
  int64_t first, count;
};

// Segments of one sign that are packed and multiplied together; `depth` columns.
struct GramPanel {
  int64_t first_segment, end_segment, depth;
  int32_t sign;
  bool dots;
  bool heads_inside;  // rows are contiguous, so that the next head lies nearer than the next columns
};

// Some heads' Grams over some panels. partial: one (h + 1, padded h) per head, partial_step bytes apart; the lower triangle holds
// the signed sum, the last row the square sums of all rows.
struct GramItem {
  const GramSegment* segments;
  const GramPanel* panels;
  int64_t panel_count, first_head, head_count, h;
  char* partial;
  int64_t partial_step;
  void* scratch;
};

TELEPORT_FAST_KERNEL(gram_item, (const GramItem& item, bool is_double))

}  // namespace teleport_fast
