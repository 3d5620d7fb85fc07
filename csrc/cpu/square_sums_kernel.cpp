// square_sums for one instruction set: a block is read once, in the order of memory; short float32 chains are added up in float64.
#include "square_sums.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

// Additions of a row that an accumulator takes before it is emptied, and how many accumulators a row has.
template <class T>
constexpr int64_t kChain = sizeof(T) == 8 ? 16 : 32;
constexpr int kChains = 4;
// Columns that are added in registers before memory is touched; as many streams are read at once.
constexpr int kColumns = 8;
// Fewer contiguous columns of a row, or fewer contiguous rows, are read as if all entries were rows, and folded at the end.
constexpr int64_t kShortRun = 32, kFoldedLanes = 1024;

template <class T>
INLINE Vec<T> absolute(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    return (Vec<T>)((Bits)x & 0x7fffffffu);
  } else {
    typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
    return (Vec<T>)((Bits)x & 0x7fffffffffffffffull);
  }
}

INLINE RowSums at(const RowSums& sums, int64_t row) {
  return {sums.squares + row, sums.l1 + row, sums.squares_lost + row, sums.l1_lost + row};
}

INLINE void clear(const RowSums& sums, int64_t rows) {
  double* all[] = {sums.squares, sums.l1, sums.squares_lost, sums.l1_lost};
  for (double* each : all) std::memset(each, 0, size_t(rows) * sizeof(double));
}

template <class T>
INLINE void add(double square, double l1, const RowSums& to) {
  if constexpr (sizeof(T) == 4) {
    *to.squares += square;
    *to.l1 += l1;
  } else {
    add_exactly(square, *to.squares, *to.squares_lost);
    add_exactly(l1, *to.l1, *to.l1_lost);
  }
}

template <class S, class T>
INLINE void add_entry(const S* x, const RowSums& to) {
  const double value = double(widen(*x));
  add<T>(value * value, value < 0 ? -value : value, to);
}

// float64 sums of a vector's lanes, in registers: halves of a float32 one; of float64, the sums and what they lost.
template <class T>
struct Lanes {
  Vec<double> first{}, second{};
};

INLINE void add(Vec<double> x, Lanes<double>& to) {
  const Vec<double> before = to.first, after = before + x, added = after - before;
  to.first = after;
  to.second += (before - (after - added)) + (x - added);
}
INLINE void add(Vec<float> x, Lanes<float>& to) {
#if defined(__AVX512F__)
  to.first += _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  to.second += _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  to.first += _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  to.second += _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
  constexpr int half = kLanes<double>;
  for (int i = 0; i < half; ++i) {
    to.first[i] += double(x[i]);
    to.second[i] += double(x[half + i]);
  }
#endif
}

INLINE void add_lanes(const Lanes<double>& lanes, double& sum, double& lost) {
  for (int l = 0; l < kLanes<double>; ++l) {
    add_exactly(lanes.first[l], sum, lost);
    lost += lanes.second[l];
  }
}
INLINE void add_lanes(const Lanes<float>& lanes, double& sum, double&) {
  const Vec<double> both = lanes.first + lanes.second;
#if defined(__AVX512F__)
  sum += _mm512_reduce_add_pd(both);
#elif defined(__AVX2__)
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
  sum += _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
#else
  for (int l = 0; l < kLanes<double>; ++l) sum += both[l];
#endif
}

// The same, of sums that lie in memory.
INLINE void add_at(Vec<double> x, double* to, double* lost) {
  Lanes<double> lanes{load(to), load(lost)};
  add(x, lanes);
  store(lanes.first, to);
  store(lanes.second, lost);
}
INLINE void add_at(Vec<float> x, double* to, double*) {
  constexpr int half = kLanes<double>;
  Lanes<float> lanes{load(to), load(to + half)};
  add(x, lanes);
  store(lanes.first, to);
  store(lanes.second, to + half);
}

// The columns of one row, contiguous.
template <class S, class T>
INLINE void add_run(const S* x, int64_t count, const RowSums& to) {
  constexpr int lanes = kLanes<T>, chains = kChains;
  constexpr int64_t run = kChain<T> * chains * lanes;
  double square = 0, l1 = 0, square_lost = 0, l1_lost = 0;
  int64_t i = 0;
  if (count >= lanes) {
    Lanes<T> square_lanes, l1_lanes;
    while (count - i >= lanes) {
      const int64_t end = i + (count - i < run ? count - i : run);
      Vec<T> squares[chains] = {}, l1s[chains] = {};
      for (; i + chains * lanes <= end; i += chains * lanes)
        for (int c = 0; c < chains; ++c) {
          const Vec<T> v = load(x + i + c * lanes);
          squares[c] = fma<T>(v, v, squares[c]);
          l1s[c] += absolute<T>(v);
        }
      for (; i + lanes <= end; i += lanes) {
        const Vec<T> v = load(x + i);
        squares[0] = fma<T>(v, v, squares[0]);
        l1s[0] += absolute<T>(v);
      }
      add((squares[0] + squares[1]) + (squares[2] + squares[3]), square_lanes);
      add((l1s[0] + l1s[1]) + (l1s[2] + l1s[3]), l1_lanes);
    }
    add_lanes(square_lanes, square, square_lost);
    add_lanes(l1_lanes, l1, l1_lost);
  }
  const RowSums sums{&square, &l1, &square_lost, &l1_lost};
  for (; i < count; ++i) add_entry<S, T>(x + i, sums);
  add<T>(square, l1, to);
  if constexpr (sizeof(T) == 8) {
    *to.squares_lost += square_lost;
    *to.l1_lost += l1_lost;
  }
}

// `Columns` columns, each of them one contiguous entry per row.
template <class S, class T, int Columns>
INLINE void add_columns(const S* x, int64_t step, int64_t rows, const RowSums& to) {
  constexpr int lanes = kLanes<T>, line = 64 / sizeof(S);
  int64_t i = 0;
  for (; i + lanes <= rows; i += lanes) {
    // What the next call reads: runs this short and many are no streams to the hardware.
    if (Columns > 1 && i % line == 0)
      for (int c = 0; c < Columns; ++c) __builtin_prefetch(x + (c + Columns) * step + i);
    Vec<T> square{}, l1{};
    for (int c = 0; c < Columns; ++c) {
      const Vec<T> v = load(x + c * step + i);
      square = fma<T>(v, v, square);
      l1 += absolute<T>(v);
    }
    add_at(square, to.squares + i, to.squares_lost + i);
    add_at(l1, to.l1 + i, to.l1_lost + i);
  }
  for (; i < rows; ++i)
    for (int c = 0; c < Columns; ++c) add_entry<S, T>(x + c * step + i, at(to, i));
}

// The two fastest axes of a block.
template <class S, class T>
void add_panel(const S* x, const Axis<1>& slow, const Axis<1>& fast, const RowSums& to) {
  const int64_t slow_step = slow.steps[0], fast_step = fast.steps[0];
  int64_t j = 0;
  if (fast_step == 1 && fast.row_step == 1 && slow.row_step == 0)
    for (; j + kColumns <= slow.size; j += kColumns) add_columns<S, T, kColumns>(x + j * slow_step, slow_step, fast.size, to);
  for (; j < slow.size; ++j) {
    const S* from = x + j * slow_step;
    const RowSums row = at(to, j * slow.row_step);
    if (fast_step == 1 && fast.row_step == 0) add_run<S, T>(from, fast.size, row);
    else if (fast_step == 1) add_columns<S, T, 1>(from, 0, fast.size, row);
    else
      for (int64_t i = 0; i < fast.size; ++i) add_entry<S, T>(from + i * fast_step, at(row, i * fast.row_step));
  }
}

// Sums of `count` lanes, added to rows (lane / width) % rows.
template <class T>
INLINE void fold(const RowSums& lanes, int64_t count, int64_t width, int64_t rows, const RowSums& to) {
  int64_t row = 0;
  for (int64_t i = 0; i < count; row = row + 1 == rows ? 0 : row + 1)
    for (int64_t end = i + width; i < end; ++i) {
      const RowSums sum = at(to, row);
      add<T>(lanes.squares[i], lanes.l1[i], sum);
      if constexpr (sizeof(T) == 8) {
        *sum.squares_lost += lanes.squares_lost[i];
        *sum.l1_lost += lanes.l1_lost[i];
      }
    }
}

// Rows of `width` contiguous columns, side by side: a 3 × 3 convolution read along its inputs.
template <class S, class T>
void add_folded(const S* x, const Axis<1>& columns, int64_t rows, int64_t width, const RowSums& to) {
  double memory[4 * kFoldedLanes];
  const RowSums lanes{memory, memory + kFoldedLanes, memory + 2 * kFoldedLanes, memory + 3 * kFoldedLanes};
  for (int64_t first = 0, count; first < rows; first += count) {
    count = rows - first < kFoldedLanes / width ? rows - first : kFoldedLanes / width;
    clear(lanes, count * width);
    add_panel<S, T>(x + first * width, columns, Axis<1>{count * width, 1, {1}}, lanes);
    fold<T>(lanes, count * width, width, count, at(to, first));
  }
}

// Columns of few rows, one after the other: many of them fill the lanes.
template <class S, class T>
void add_narrow(const S* x, int64_t columns, int64_t rows, const RowSums& to) {
  double memory[4 * kFoldedLanes];
  const RowSums lanes{memory, memory + kFoldedLanes, memory + 2 * kFoldedLanes, memory + 3 * kFoldedLanes};
  const int64_t together = kFoldedLanes / rows, groups = columns / together, used = (groups ? together : columns) * rows;
  clear(lanes, used);
  add_panel<S, T>(x, Axis<1>{groups, 0, {together * rows}}, Axis<1>{together * rows, 1, {1}}, lanes);
  add_panel<S, T>(x + groups * together * rows, Axis<1>{1, 0, {0}}, Axis<1>{(columns - groups * together) * rows, 1, {1}}, lanes);
  fold<T>(lanes, used, 1, rows, to);
}

template <class S, class T>
void add_block(const SumsItem& item) {
  const Axis<1>* axes = item.block.axes;
  clear(item.sums, item.rows);
  const bool folds = axes[3].row_step == 0 && axes[3].size < kShortRun && axes[3].steps[0] == 1 && axes[2].row_step == 1 &&
                     axes[2].steps[0] == axes[3].size && axes[1].row_step == 0;
  if (folds) {
    for (int64_t i = 0; i < axes[0].size; ++i)
      add_folded<S, T>(
          static_cast<const S*>(item.block.data[0]) + i * axes[0].steps[0], axes[1], axes[2].size, axes[3].size,
          at(item.sums, i * axes[0].row_step));
    return;
  }
  const bool narrow = axes[3].row_step == 1 && axes[3].size < kShortRun && axes[3].steps[0] == 1 && axes[2].row_step == 0 &&
                      axes[2].steps[0] == axes[3].size;
  for (int64_t i = 0; i < axes[0].size; ++i)
    for (int64_t j = 0; j < axes[1].size; ++j) {
      const int64_t row = i * axes[0].row_step + j * axes[1].row_step;
      const S* x = static_cast<const S*>(item.block.data[0]) + i * axes[0].steps[0] + j * axes[1].steps[0];
      if (narrow) add_narrow<S, T>(x, axes[2].size, axes[3].size, at(item.sums, row));
      else add_panel<S, T>(x, axes[2], axes[3], at(item.sums, row));
    }
}

}  // namespace

void sums_item(const SumsItem& item) {
  switch (item.storage) {
    case Storage::Float64: return add_block<double, double>(item);
    case Storage::BFloat16: return add_block<BFloat16, float>(item);
    case Storage::Half: return add_block<Half, float>(item);
    default: return add_block<float, float>(item);
  }
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
