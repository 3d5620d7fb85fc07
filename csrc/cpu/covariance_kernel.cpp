// covariance_ for one instruction set: adds the weighted Grams to the rows of C in one pass over C.
#include "covariance.h"
#include "gram_difference.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

template <class T>
void add_rows(const CovarianceRows& rows) {
  constexpr int lanes = kLanes<T>;
  const int64_t h = rows.h, row_bytes = gram_row_bytes(h, sizeof(T));
  T* covariance = static_cast<T*>(rows.covariance);
  const Vec<T> decay = splat(T(rows.decay));
  for (int64_t i = rows.first; i < rows.end; ++i) {
    T* row = covariance + i * h;
    for (int64_t j = 0; j <= i; j += lanes) {
      const int count = int(i + 1 - j < lanes ? i + 1 - j : lanes);
      T entries[lanes] = {};
      if (count == lanes) store(load(row + j), entries);
      else
        for (int k = 0; k < count; ++k) entries[k] = row[j + k];
      Vec<T> sum = decay * load(entries);
      // A Gram's rows are padded with zeros, so that the last vector may be read whole.
      for (int64_t s = 0; s < rows.gram_count; ++s) {
        const T* gram = reinterpret_cast<const T*>(rows.grams[s].gram + i * row_bytes);
        sum = fma<T>(splat(T(rows.grams[s].weight)), load(gram + j), sum);
      }
      store(sum, entries);
      for (int k = 0; k < count; ++k) row[j + k] = covariance[(j + k) * h + i] = entries[k];
    }
  }
}

}  // namespace

void covariance_rows(const CovarianceRows& rows, bool is_double) {
  if (is_double) add_rows<double>(rows);
  else add_rows<float>(rows);
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
