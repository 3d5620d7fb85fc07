// The vectors of one instruction set: loads and stores with conversion, fused multiply-add, transposed packing; no STL.
//
// Compiled once per instruction set, with TELEPORT_FAST_ISA naming a namespace of its own: a template that two instruction
// sets shared would be merged by the linker, and AVX-512 code could end up on a CPU without it.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "storage.h"

#ifndef TELEPORT_FAST_ISA
#error "TELEPORT_FAST_ISA must name the namespace of the instruction set"
#endif
#define INLINE inline __attribute__((always_inline))
// One copy of what is called once per panel: it halves the compile time and costs nothing.
#define NOINLINE __attribute__((noinline))

namespace teleport_fast::TELEPORT_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kMaxRows = 8;  // 16 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kMaxRows = 6;  // 12 accumulators, two vectors and a broadcast: 15 of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kMaxRows = 4;  // no fused multiply-add: the product needs a register too
#endif

template <class T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int count = kVectorBytes / sizeof(T);
};
template <class T>
using Vec = typename Lanes<T>::Vector;
template <class T>
constexpr int kLanes = Lanes<T>::count;
// Panels are cut into strips of two vectors: [strip][k][kStrip], so that a tile's loads are contiguous whatever the strides were.
template <class T>
constexpr int kStrip = 2 * kLanes<T>;

template <class T>
INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // folded into a broadcast; x + 0 is not, since it would turn -0 into 0
}

template <class T>
INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_fmadd_ps(a, b, c);
  else return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_fmadd_ps(a, b, c);
  else return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// One element, whatever it is stored as.
INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
INLINE float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
INLINE float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude << 13));
  if (magnitude >= 0x0400u) return from_bits(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
  // A subnormal is magnitude * 2^-24; as an integer conversion it is exact even where denormals are flushed.
  const float value = float(int32_t(magnitude)) * 0x1p-24f;
  return from_bits(sign | to_bits(value));
#endif
}

// Round to nearest, ties to even.
INLINE void narrow(float x, float* to) { *to = x; }
INLINE void narrow(double x, double* to) { *to = x; }
INLINE void narrow(float x, BFloat16* to) {
  const uint32_t bits = to_bits(x);
  if (x != x) to->bits = uint16_t((bits >> 16) | 0x40u);
  else to->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
INLINE void narrow(float x, Half* to) {
#if defined(__F16C__)
  to->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t sign = (to_bits(x) >> 16) & 0x8000u;
  const uint32_t magnitude = to_bits(x) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  else if (magnitude >= 0x477ff000u) half = 0x7c00u;  // 65520 and up round to infinity
  else if (magnitude >= 0x38800000u) half = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  else half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);  // 0.5 has an ulp of 2^-24, the subnormals' step
  to->bits = uint16_t(sign | half);
#endif
}

template <class T>
INLINE Vec<T> load(const T* from) {
  Vec<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

#if defined(__AVX512F__)
INLINE Vec<float> load(const BFloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}
INLINE Vec<float> load(const Half* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
#elif defined(__AVX2__)
INLINE Vec<float> load(const BFloat16* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
}
INLINE Vec<float> load(const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
#else
template <class S>
INLINE Vec<float> load_each(const S* from) {
  Vec<float> x;
  for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = widen(from[lane]);
  return x;
}
INLINE Vec<float> load(const BFloat16* from) { return load_each(from); }
INLINE Vec<float> load(const Half* from) { return load_each(from); }
#endif

template <class T>
INLINE void store(Vec<T> x, T* to) {
  std::memcpy(to, &x, sizeof x);
}
#if defined(__AVX512F__)
INLINE void store(Vec<float> x, Half* to) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
INLINE void store(Vec<float> x, Half* to) { _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
INLINE void store(Vec<float> x, Half* to) {
  for (int lane = 0; lane < kLanes<float>; ++lane) narrow(x[lane], to + lane);
}
#endif
INLINE void store(Vec<float> x, BFloat16* to) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits bits = (Bits)x, is_nan = (Bits)(x != x);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u), quiet = bits | 0x400000u;
  const Bits result = ((rounded & ~is_nan) | (quiet & is_nan)) >> 16;
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)result));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)result, (__m256i)result);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane].bits = uint16_t(result[lane]);
#endif
}

// The first `count` elements, zeros after them; what lies behind is not touched.
#if defined(__AVX512F__)
INLINE Vec<float> load_part(const float* from, int count) { return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from); }
INLINE Vec<double> load_part(const double* from, int count) { return _mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), from); }
INLINE Vec<float> load_part(const BFloat16* from, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLINE Vec<float> load_part(const Half* from, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from));
}
#else
template <class S>
INLINE auto load_part(const S* from, int count) {
  decltype(load(from)) x{};
  for (int lane = 0; lane < int(sizeof x / sizeof x[0]); ++lane)
    if (lane < count) x[lane] = widen(from[lane]);
  return x;
}
#if defined(__AVX2__)
INLINE __m256i first_lanes(int bytes) {
  static constexpr int32_t window[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256((const __m256i*)((const char*)(window + 8) - bytes));
}
INLINE Vec<float> load_part(const float* from, int count) { return _mm256_maskload_ps(from, first_lanes(4 * count)); }
INLINE Vec<double> load_part(const double* from, int count) { return _mm256_maskload_pd(from, first_lanes(8 * count)); }
#endif
#endif

// A square block of kBlock<T> rows, each contiguous, written as columns: by scalar stores it takes about 1 cycle an element, as
// long as the whole product of a width of 32.
#if defined(__AVX2__)
template <class T>
constexpr int kBlock = 32 / sizeof(T);
INLINE __m128 load128(const float* from) { return _mm_loadu_ps(from); }
INLINE __m128 load128(const BFloat16* from) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from)), 16));
}
INLINE __m128 load128(const Half* from) { return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from)); }

template <class S>
INLINE void transpose_block(const S* from, int64_t from_step, float* to, int64_t to_step) {
  // Rows i and i + 4 share a register, so that no shuffle crosses the halves.
  for (int half = 0; half < 2; ++half, from += 4, to += 4 * to_step) {
    __m256 r[4], t[4];
    for (int i = 0; i < 4; ++i)
      r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(load128(from + i * from_step)), load128(from + (i + 4) * from_step), 1);
    for (int i = 0; i < 4; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    _mm256_storeu_ps(to, _mm256_shuffle_ps(t[0], t[2], 0x44));
    _mm256_storeu_ps(to + to_step, _mm256_shuffle_ps(t[0], t[2], 0xee));
    _mm256_storeu_ps(to + 2 * to_step, _mm256_shuffle_ps(t[1], t[3], 0x44));
    _mm256_storeu_ps(to + 3 * to_step, _mm256_shuffle_ps(t[1], t[3], 0xee));
  }
}
INLINE void transpose_block(const double* from, int64_t from_step, double* to, int64_t to_step) {
  for (int half = 0; half < 2; ++half, from += 2, to += 2 * to_step) {
    __m256d r[2];
    for (int i = 0; i < 2; ++i)
      r[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(from + i * from_step)), _mm_loadu_pd(from + (i + 2) * from_step), 1);
    _mm256_storeu_pd(to, _mm256_unpacklo_pd(r[0], r[1]));
    _mm256_storeu_pd(to + to_step, _mm256_unpackhi_pd(r[0], r[1]));
  }
}
#else
template <class T>
constexpr int kBlock = 4;
template <class S, class T>
INLINE void transpose_block(const S* from, int64_t from_step, T* to, int64_t to_step) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * to_step + i] = widen(from[i * from_step + j]);
}
#endif

// Asks for the row of `count` elements that is needed soon: rows that lie far apart are no stream to the hardware.
template <class S>
INLINE void prefetch_row(const S* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(from + i);
}

// to[a / kStrip][b][a % kStrip] = from[a * a_step + b * b_step] for a < rows, b < depth; missing rows of the last strip are zero.
// A strip is `pitch` elements long. What lies `ahead` of every element will be packed next, and is asked for.
template <class S, class T>
NOINLINE void pack_strips(const S* from, int64_t a_step, int64_t b_step, int64_t rows, int64_t depth, T* to, int64_t pitch, int64_t ahead) {
  constexpr int width = kStrip<T>, lanes = kLanes<T>, block = kBlock<T>;
  for (int64_t first = 0; first < rows; first += width, to += pitch) {
    const int count = int(rows - first < width ? rows - first : width);
    const S* strip = from + first * a_step;
    if (a_step == 1 && count == width) {
      for (int64_t b = 0; b < depth; ++b) {
        const S* row = strip + b * b_step;
        prefetch_row(row + ahead, width);
        for (int a = 0; a < width; a += lanes) store(load(row + a), to + b * width + a);
      }
      continue;
    }
    if (a_step == 1) {
      const int low = count < lanes ? count : lanes;
      for (int64_t b = 0; b < depth; ++b) {
        const S* row = strip + b * b_step;
        prefetch_row(row + ahead, count);
        store(load_part(row, low), to + b * width);
        store(load_part(row + low, count - low), to + b * width + lanes);
      }
      continue;
    }
    if (count < width)
      for (int64_t b = 0; b < depth; ++b)
        for (int a = count; a < width; ++a) to[b * width + a] = 0;
    int done = 0;
    if (b_step == 1) {
      const int64_t deep = depth / block * block;
      for (; done + block <= count; done += block) {
        for (int64_t b = 0; b < deep; b += block) {
          const S* corner = strip + done * a_step + b;
          if (b % (64 / int64_t(sizeof(S))) == 0)
            for (int a = 0; a < block; ++a) __builtin_prefetch(corner + a * a_step + ahead);
          transpose_block(corner, a_step, to + b * width + done, width);
        }
        for (int64_t b = deep; b < depth; ++b)
          for (int a = done; a < done + block; ++a) to[b * width + a] = widen(strip[a * a_step + b]);
      }
    }
    for (int a = done; a < count; ++a)
      for (int64_t b = 0; b < depth; ++b) to[b * width + a] = widen(strip[a * a_step + b * b_step]);
  }
}

// sum[m][v] = Σ_k rows[m * row_step + k * depth_step] * strip[k][v]: `Rows` broadcast rows against `Vectors` vectors of a strip.
template <class T, int Rows, int Vectors>
INLINE void multiply_tile(const T* rows, int64_t row_step, int64_t depth_step, const T* strip, int64_t depth, Vec<T> (&sum)[Rows][Vectors]) {
  for (int m = 0; m < Rows; ++m)
    for (int v = 0; v < Vectors; ++v) sum[m][v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> x[Vectors];
    for (int v = 0; v < Vectors; ++v) x[v] = load(strip + k * kStrip<T> + v * kLanes<T>);
    for (int m = 0; m < Rows; ++m) {
      const Vec<T> y = splat(rows[m * row_step + k * depth_step]);
      for (int v = 0; v < Vectors; ++v) sum[m][v] = fma<T>(y, x[v], sum[m][v]);
    }
  }
}

// Calls f.template run<R>(first) over tiles of R <= Most rows that differ by at most one, so that no tile is too thin to hide
// the latency of its additions.
template <int R, class F>
INLINE void run_tile(int rows, int64_t first, const F& f) {
  if constexpr (R > 0) {
    if (rows == R) f.template run<R>(first);
    else run_tile<R - 1>(rows, first, f);
  }
}
template <int Most = kMaxRows, class F>
INLINE void for_row_tiles(int64_t rows, const F& f) {
  const int64_t tiles = (rows + Most - 1) / Most;
  int64_t first = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t next = rows * (t + 1) / tiles;
    run_tile<Most>(int(next - first), first, f);
    first = next;
  }
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
