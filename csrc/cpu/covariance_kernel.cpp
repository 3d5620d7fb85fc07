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
  // A Gram's rows are padded with zeros, so that the last vector may be read whole.
  auto sum_at = [&](int64_t i, int64_t j, Vec<T> sum) {
    sum = decay * sum;
    for (int64_t s = 0; s < rows.gram_count; ++s) {
      const T* gram = reinterpret_cast<const T*>(rows.grams[s].gram + i * row_bytes);
      sum = fma<T>(splat(T(rows.grams[s].weight)), load(gram + j), sum);
    }
    return sum;
  };
  // Whole vectors before the first row's diagonal; then they are mirrored in blocks, since a column is written a line an entry.
  const int64_t whole = rows.first / lanes * lanes, end = rows.end;
  for (int64_t i = rows.first; i < end; ++i) {
    T* row = covariance + i * h;
    for (int64_t j = 0; j < whole; j += lanes) store(sum_at(i, j, load(row + j)), row + j);
    for (int64_t j = whole; j <= i; j += lanes) {
      const int count = int(i + 1 - j < lanes ? i + 1 - j : lanes);
      T entries[lanes] = {};
      for (int k = 0; k < count; ++k) entries[k] = row[j + k];
      store(sum_at(i, j, load(entries)), entries);
      for (int k = 0; k < count; ++k) row[j + k] = covariance[(j + k) * h + i] = entries[k];
    }
  }
  constexpr int block = kBlock<T>;
  const int64_t blocks_end = rows.first + (end - rows.first) / block * block, columns_end = whole / block * block;
  for (int64_t j = 0; j < columns_end; j += block)
    for (int64_t i = rows.first; i < blocks_end; i += block) transpose_block(covariance + i * h + j, h, covariance + j * h + i, h);
  for (int64_t i = rows.first; i < end; ++i)
    for (int64_t j = i < blocks_end ? columns_end : 0; j < whole; ++j) covariance[j * h + i] = covariance[i * h + j];
}

}  // namespace

void covariance_rows(const CovarianceRows& rows, bool is_double) {
  if (is_double) add_rows<double>(rows);
  else add_rows<float>(rows);
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
