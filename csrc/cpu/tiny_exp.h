// Exponentials of 2 × 2 and 3 × 3 matrices, one matrix in each lane: alone, such a matrix would fill a quarter of a vector.
#pragma once

#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {

// Degrees of the Taylor polynomial, and the norms up to which its backward error stays within the unit roundoff.
template <class T>
constexpr int kTinyDegree = sizeof(T) == 4 ? 13 : 17;
template <class T>
constexpr double kTinyNorm = sizeof(T) == 4 ? 1.708 : 0.9305;

template <class T, int H>
struct Tiny {
  Vec<T> entry[H * H];
};

// factor x y + add.
template <class T, int H>
INLINE Tiny<T, H> multiply_add(T factor, const Tiny<T, H>& x, const Tiny<T, H>& y, const Tiny<T, H>& add) {
  Tiny<T, H> out = add;
  for (int i = 0; i < H; ++i)
    for (int k = 0; k < H; ++k) {
      const Vec<T> entry = splat(factor) * x.entry[i * H + k];
      for (int j = 0; j < H; ++j) out.entry[i * H + j] = fma<T>(entry, y.entry[k * H + j], out.entry[i * H + j]);
    }
  return out;
}

// I + A (I + A/2 (I + A/3 …)): at these widths the plainest order costs no more than one with fewer products.
template <class T, int H>
INLINE Tiny<T, H> taylor(const Tiny<T, H>& A) {
  Tiny<T, H> identity = {};
  for (int i = 0; i < H; ++i) identity.entry[i * (H + 1)] = splat(T(1));
  Tiny<T, H> sum = identity;
  for (int k = kTinyDegree<T>; k > 0; --k) sum = multiply_add(T(1) / T(k), A, sum, identity);
  return sum;
}

// e^(sign A) of up to kLanes<T> matrices; what a lane holds depends on its own matrix only.
template <class T, int H>
NOINLINE void tiny_exp(const T* matrices, int count, T sign, T* out) {
  constexpr int lanes = kLanes<T>;
  T memory[H * H][lanes] = {};
  for (int lane = 0; lane < count; ++lane)
    for (int e = 0; e < H * H; ++e) memory[e][lane] = matrices[lane * H * H + e];
  Tiny<T, H> A;
  for (int e = 0; e < H * H; ++e) A.entry[e] = load(memory[e]);

  Vec<T> norms = {}, all = {};
  for (int j = 0; j < H; ++j) {
    Vec<T> sum = {};
    for (int i = 0; i < H; ++i) sum += A.entry[i * H + j] < 0 ? -A.entry[i * H + j] : A.entry[i * H + j];
    norms = sum > norms ? sum : norms;
    all += sum;
  }
  // NaN where an entry is NaN or infinite, else zero.
  const Vec<T> poison = all - all;
  T scale[lanes], squarings[lanes];
  int most = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    int times = 0;
    double rest = poison[lane] == 0 ? double(norms[lane]) : 0.0, factor = double(sign);
    for (; rest > kTinyNorm<T>; rest /= 2, factor /= 2) ++times;
    scale[lane] = T(factor);
    squarings[lane] = T(times);
    most = times > most ? times : most;
  }
  for (int e = 0; e < H * H; ++e) A.entry[e] *= load(scale);

  Tiny<T, H> y = taylor(A);
  const Vec<T> times = load(squarings);
  for (int t = 0; t < most; ++t) {
    const Tiny<T, H> square = multiply_add(T(1), y, y, Tiny<T, H>{});
    for (int e = 0; e < H * H; ++e) y.entry[e] = times > T(t) ? square.entry[e] : y.entry[e];
  }
  for (int e = 0; e < H * H; ++e) store(y.entry[e] + poison, memory[e]);
  for (int lane = 0; lane < count; ++lane)
    for (int e = 0; e < H * H; ++e) out[lane * H * H + e] = memory[e][lane];
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
