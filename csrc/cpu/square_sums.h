// square_sums: the work items that its host side hands to the kernel of one instruction set.
#pragma once

#include "block.h"
#include "isa.h"
#include "storage.h"

namespace teleport_fast {

// Sums and what their float64 additions lost (float64 storage only), one entry per row each.
struct RowSums {
  double *squares, *l1, *squares_lost, *l1_lost;
};

// Row sums of one block, written to `sums`. The block counts its rows from 0 without gaps.
struct SumsItem {
  Block<1> block;
  Storage storage;
  RowSums sums;
  int64_t rows;
};

// sum += x, and lost += what the rounding took. A chain of n plain additions of float64 would lose sqrt(n) / 2 ulp.
// Static, as the linker may not merge what is compiled for several instruction sets.
static inline void add_exactly(double x, double& sum, double& lost) {
  const double before = sum, after = before + x, added = after - before;
  sum = after;
  lost += (before - (after - added)) + (x - added);
}

TELEPORT_FAST_KERNEL(sums_item, (const SumsItem& item))

}  // namespace teleport_fast
