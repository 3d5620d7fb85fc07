// The square roots of a vector's lanes, each rounded once.
#pragma once

#include "vec.h"

#if !defined(__SSE2__)
#include <cmath>
#endif

namespace teleport_fast::TELEPORT_FAST_ISA {

template <class T>
INLINE Vec<T> square_root(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_sqrt_ps(x);
  else return _mm512_sqrt_pd(x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_sqrt_ps(x);
  else return _mm256_sqrt_pd(x);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return _mm_sqrt_ps(x);
  else return _mm_sqrt_pd(x);
#else
  for (int i = 0; i < kLanes<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
