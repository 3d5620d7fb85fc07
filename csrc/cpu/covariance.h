// covariance_: the rows of C that its host side hands to the kernel of one instruction set, once the Grams are there.
#pragma once

#include "isa.h"
#include "storage.h"

namespace teleport_fast {

// A Gram's lower triangle, with rows as long as gram_row_bytes says, and its factor.
struct WeightedGram {
  const char* gram;
  double weight;
};

// C = decay * C + Σ weight * gram in rows [first, end) of the lower triangle and the same columns of the upper one; C: (h, h).
struct CovarianceRows {
  const WeightedGram* grams;
  int64_t gram_count, first, end, h;
  double decay;
  void* covariance;
};

TELEPORT_FAST_KERNEL(covariance_rows, (const CovarianceRows& rows, bool is_double))

}  // namespace teleport_fast
