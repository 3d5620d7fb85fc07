// The columns of a segment, run by run, as far as one step of memory leads through them.
#pragma once

#include "gram_difference.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {

// Calls f(offset of a run in one head, its first inner column, its columns).
template <class F>
INLINE void for_runs(const GramSegment& segment, int64_t head, const F& f) {
  const View& view = *segment.view;
  int64_t column = segment.first, left = segment.count;
  while (left > 0) {
    const int64_t outer = column / view.inner, inner = column % view.inner;
    const int64_t run = left < view.inner - inner ? left : view.inner - inner;
    f(head * view.head_step + outer * view.outer_step + inner * view.inner_step, inner, run);
    column += run;
    left -= run;
  }
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
