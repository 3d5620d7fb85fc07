// Grams of rows that are contiguous along the columns: dot products with the lanes along the columns, so that nothing is transposed.
#pragma once

#include "gram_runs.h"

namespace teleport_fast::TELEPORT_FAST_ISA {

// Rows against columns of a tile: 12 accumulators, three vectors and one more fill AVX2's registers; 7 loads feed 12 multiply-adds.
// AVX-512 has room for 16, whose lanes are added up together: 48 steps for 16 sums, where four at a time take 80.
#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotColumns = 4;
#else
constexpr int kDotRows = 4, kDotColumns = 3;
#endif
// Rows that stay in the first-level cache while all rows below pass by: 24 KB, beside 4 KB of the latter. A multiple of both.
constexpr int64_t kDotBlock = 24;
// An odd number of cache lines, so that rows spread over all cache sets.
template <class T>
constexpr int64_t kDotPitch = kGramDotPitch / int64_t(sizeof(T));

#if defined(__AVX2__)
INLINE __m256 fold(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
  return x;
#endif
}
INLINE __m256d fold(Vec<double> x) {
#if defined(__AVX512F__)
  return _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1));
#else
  return x;
#endif
}
// Sums of a and of b in turn, half as many of each; the halves of 16 bytes stay apart.
INLINE __m256 add_pairs(__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
INLINE __m256d add_pairs(__m256d a, __m256d b) { return _mm256_add_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b)); }

// out[i] += sign * Σ over the lanes of x[i], i < 4.
INLINE void add_lane_sums(const Vec<float> (&x)[4], float sign, float* out) {
  const __m256 s = add_pairs(fold(x[0]), fold(x[1])), t = add_pairs(fold(x[2]), fold(x[3]));
  const __m256 four = _mm256_add_ps(_mm256_shuffle_ps(s, t, 0x44), _mm256_shuffle_ps(s, t, 0xee));
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
  _mm_storeu_ps(out, _mm_fmadd_ps(_mm_set1_ps(sign), sum, _mm_loadu_ps(out)));
}
INLINE void add_lane_sums(const Vec<double> (&x)[4], double sign, double* out) {
  const __m256d s = add_pairs(fold(x[0]), fold(x[1])), t = add_pairs(fold(x[2]), fold(x[3]));
  const __m256d sum = _mm256_add_pd(_mm256_permute2f128_pd(s, t, 0x20), _mm256_permute2f128_pd(s, t, 0x31));
  _mm256_storeu_pd(out, _mm256_fmadd_pd(_mm256_set1_pd(sign), sum, _mm256_loadu_pd(out)));
}
#else
template <class T>
INLINE void add_lane_sums(const Vec<T> (&x)[4], T sign, T* out) {
  for (int i = 0; i < 4; ++i) {
    T sum = x[i][0] + x[i][1];
    for (int lane = 2; lane < kLanes<T>; lane += 2) sum += x[i][lane] + x[i][lane + 1];
    out[i] += sign * sum;
  }
}
#endif

// out[m * step + c] += sign * Σ over the lanes of x[m][c].
template <class T, int Rows>
INLINE void add_sums(const Vec<T> (&x)[Rows][4], T sign, T* out, int64_t step) {
  for (int m = 0; m < Rows; ++m) add_lane_sums(x[m], sign, out + m * step);
}
#if defined(__AVX512F__)
// Halves of the 16-byte parts of a and b in turn.
INLINE __m512 add_parts(__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd); }
INLINE __m512d add_parts(__m512d a, __m512d b) { return _mm512_shuffle_f64x2(a, b, 0x88) + _mm512_shuffle_f64x2(a, b, 0xdd); }
INLINE __m512 add_pairs(__m512 a, __m512 b) { return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b); }
INLINE __m512d add_pairs(__m512d a, __m512d b) { return _mm512_unpacklo_pd(a, b) + _mm512_unpackhi_pd(a, b); }

INLINE void add_sums(const Vec<float> (&x)[4][4], float sign, float* out, int64_t step) {
  __m512 row[4];
  for (int m = 0; m < 4; ++m) {
    const __m512 s = add_pairs(x[m][0], x[m][1]), t = add_pairs(x[m][2], x[m][3]);
    row[m] = _mm512_shuffle_ps(s, t, 0x44) + _mm512_shuffle_ps(s, t, 0xee);
  }
  const __m512 sums = add_parts(add_parts(row[0], row[1]), add_parts(row[2], row[3]));
  const __m128 part[4] = {_mm512_castps512_ps128(sums), _mm512_extractf32x4_ps(sums, 1), _mm512_extractf32x4_ps(sums, 2),
                          _mm512_extractf32x4_ps(sums, 3)};
  for (int m = 0; m < 4; ++m) _mm_storeu_ps(out + m * step, _mm_fmadd_ps(_mm_set1_ps(sign), part[m], _mm_loadu_ps(out + m * step)));
}
INLINE void add_sums(const Vec<double> (&x)[4][4], double sign, double* out, int64_t step) {
  __m512d row[4];
  for (int m = 0; m < 4; ++m) row[m] = add_parts(add_pairs(x[m][0], x[m][1]), add_pairs(x[m][2], x[m][3]));
  for (int m = 0; m < 4; m += 2) {
    const __m512d sums = add_parts(row[m], row[m + 1]);
    const __m256d part[2] = {_mm512_castpd512_pd256(sums), _mm512_extractf64x4_pd(sums, 1)};
    for (int i = 0; i < 2; ++i) {
      double* to = out + (m + i) * step;
      _mm256_storeu_pd(to, _mm256_fmadd_pd(_mm256_set1_pd(sign), part[i], _mm256_loadu_pd(to)));
    }
  }
}
#endif

// `count` columns of some rows of a view, widened, into rows of kDotPitch. What lies `ahead` will be copied next, and is asked for:
// without it 50 MB took 1.2 times as long in the one run that compared them.
template <class S, class T>
NOINLINE void copy_rows(const S* from, int64_t row_step, int64_t rows, int64_t count, T* to, int64_t ahead) {
  constexpr int64_t lanes = kLanes<T>, line = 64 / int64_t(sizeof(S));
  for (int64_t r = 0; r < rows; ++r, from += row_step, to += kDotPitch<T>) {
    int64_t k = 0;
    for (; k + line <= count; k += line) {
      __builtin_prefetch(from + k + ahead);
      for (int64_t v = 0; v < line; v += lanes) store(load(from + k + v), to + k + v);
    }
    for (; k < count; ++k) to[k] = widen(from[k]);
  }
}

template <class S, class T>
void copy_segment(const GramSegment& segment, int64_t head, int64_t first_row, int64_t rows, int64_t h, T* to) {
  const View& view = *segment.view;
  const bool last = segment.first + segment.count == view.columns();
  for_runs(segment, head, [&](int64_t offset, int64_t inner, int64_t run) {
    const S* from = static_cast<const S*>(view.data) + offset + first_row * view.row_step;
    // After the last rows come the first ones of the next panel, which may be the next head's.
    const int64_t next_panel = (last ? view.head_step - inner : run) - first_row * view.row_step;
    copy_rows(from, view.row_step, rows, run, to, first_row + kDotRows < h ? kDotRows * view.row_step : next_panel);
    to += run;
  });
}
INLINE void copy(const GramSegment& segment, int64_t head, int64_t first_row, int64_t rows, int64_t h, float* to) {
  switch (segment.view->storage) {
    case Storage::BFloat16: return copy_segment<BFloat16>(segment, head, first_row, rows, h, to);
    case Storage::Half: return copy_segment<Half>(segment, head, first_row, rows, h, to);
    default: return copy_segment<float>(segment, head, first_row, rows, h, to);
  }
}
INLINE void copy(const GramSegment& segment, int64_t head, int64_t first_row, int64_t rows, int64_t h, double* to) {
  copy_segment<double>(segment, head, first_row, rows, h, to);
}

// `Rows` rows against the rows [first, first + Columns) of `columns`: out[m * out_step + first + c] += sign * their dot products.
template <class T, int Rows>
struct DotTile {
  const T *rows, *columns;
  int64_t depth;
  T sign, *out;
  int64_t out_step;

  template <int Columns>
  INLINE void run(int64_t first) const {
    Vec<T> sum[Rows][4];
    for (int m = 0; m < Rows; ++m)
      for (int c = 0; c < 4; ++c) sum[m][c] = Vec<T>{};
    const T* column = columns + first * kDotPitch<T>;
    for (int64_t k = 0; k < depth; k += kLanes<T>) {
      Vec<T> x[Columns];
      for (int c = 0; c < Columns; ++c) x[c] = load(column + c * kDotPitch<T> + k);
      for (int m = 0; m < Rows; ++m) {
        const Vec<T> y = load(rows + m * kDotPitch<T> + k);
        for (int c = 0; c < Columns; ++c) sum[m][c] = fma<T>(y, x[c], sum[m][c]);
      }
    }
    add_sums(sum, sign, out + first, out_step);
  }
};

// Rows against themselves, lower half; the square sums are its diagonal.
template <class T>
struct DotTriangle {
  const T* rows;
  int64_t depth;
  T sign, *out;
  int64_t out_step;
  T* squares;

  // Bounds are constant, or the compiler would keep the sums in memory.
  template <int Rows>
  INLINE void run(int64_t) const {
    Vec<T> sum[Rows][4];
    for (int m = 0; m < Rows; ++m)
      for (int c = 0; c < 4; ++c) sum[m][c] = Vec<T>{};
    for (int64_t k = 0; k < depth; k += kLanes<T>) {
      Vec<T> x[Rows];
      for (int m = 0; m < Rows; ++m) x[m] = load(rows + m * kDotPitch<T> + k);
      for (int m = 0; m < Rows; ++m)
        for (int c = 0; c < Rows; ++c)
          if (c <= m) sum[m][c] = fma<T>(x[m], x[c], sum[m][c]);
    }
    add_sums(sum, sign, out, out_step);
    Vec<T> diagonal[4] = {};
    for (int m = 0; m < Rows; ++m) diagonal[m] = sum[m][m];
    add_lane_sums(diagonal, T(1), squares);
  }
};

// partial += sign * (one head's columns of a panel) * (the same)ᵀ, lower half. What a sum of four writes beside it gets a zero.
template <class T>
void add_dots(const GramItem& item, const GramPanel& panel, int64_t head) {
  const int64_t h = item.h, ld = gram_row_bytes(h, sizeof(T)) / int64_t(sizeof(T));
  const int64_t depth = (panel.depth + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  T* packed = static_cast<T*>(item.scratch);
  T* partial = reinterpret_cast<T*>(item.partial + head * item.partial_step);
  const T sign = T(panel.sign);
  for (int64_t block = 0; block < h; block += kDotBlock) {
    const int64_t block_end = h < block + kDotBlock ? h : block + kDotBlock;
    for (int64_t i = block; i < h; i += kDotRows) {
      const int64_t rows = h - i < kDotRows ? h - i : kDotRows;
      T* own = packed + i * kDotPitch<T>;
      if (block == 0) {
        int64_t at = 0;
        for (int64_t s = panel.first_segment; s < panel.end_segment; at += item.segments[s++].count)
          copy(item.segments[s], item.first_head + head, i, rows, h, own + at);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t k = at; k < depth; ++k) own[r * kDotPitch<T> + k] = 0;
      }
      T* out = partial + i * ld;
      const int64_t columns = (i < block_end ? i : block_end) - block;
      const T* column = packed + block * kDotPitch<T>;
      switch (columns ? rows : 0) {
        case 4: for_row_tiles<kDotColumns>(columns, DotTile<T, 4>{own, column, depth, sign, out + block, ld}); break;
        case 3: for_row_tiles<kDotColumns>(columns, DotTile<T, 3>{own, column, depth, sign, out + block, ld}); break;
        case 2: for_row_tiles<kDotColumns>(columns, DotTile<T, 2>{own, column, depth, sign, out + block, ld}); break;
        case 1: for_row_tiles<kDotColumns>(columns, DotTile<T, 1>{own, column, depth, sign, out + block, ld}); break;
      }
      if (i < block_end) for_row_tiles<kDotRows>(rows, DotTriangle<T>{own, depth, sign, out + i, ld, partial + h * ld + i});
    }
  }
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
