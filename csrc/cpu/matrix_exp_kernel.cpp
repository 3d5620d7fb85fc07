// matrix_exp for one instruction set: scaling, a Taylor polynomial in few products, and squaring.
#include "matrix_exp.h"
#include "small_matrix.h"
#include "tiny_exp.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

// A polynomial, its matrix products, and the norm up to which its backward error stays within the unit roundoff: where the sum of
// |coefficients| of log(e^-x T(x)) / x, computed in rational arithmetic, reaches it.
struct Polynomial {
  int degree, products;
  double largest_float, largest_double;
};
// exp(A) alone. 8 and 18: Bader, Blanes, Casas, "Computing the matrix exponential with an optimized Taylor polynomial
// approximation", Mathematics 7 (2019) 1174; their expansions equal Taylor's, checked in rational arithmetic to 1e-15.
constexpr Polynomial kOne[] = {{18, 5, 3.01, 1.091}, {8, 3, 0.5801, 0.04991}, {4, 2, 0.05117, 3.397e-4}};
// exp(A) and exp(-A): the powers A², A⁴ … and the even part are shared, the odd part changes its sign (own).
constexpr Polynomial kPair[] = {
    {17, 7, 2.743, 0.9305}, {13, 6, 1.708, 0.3998}, {9, 5, 0.7795, 0.08958}, {5, 3, 0.1308, 0.002401}, {3, 2, 0.01123, 1.386e-5}};
// Squaring e^A - 1 as Y² + 2Y keeps digits that 1 + Y rounds off, as long as e^A is near 1.
constexpr double kNearOne = 0.5;

constexpr double kInverseFactorial[] = {
    1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800,
    1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200, 1.0 / 1307674368000, 1.0 / 20922789888000,
    1.0 / 355687428096000};

// out = Σ_i factors[step i] terms[i].
template <class T>
NOINLINE void combine(T* const* terms, const double* factors, int step, int count, T* out, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    Vec<T> sum = splat(T(factors[0])) * load(terms[0] + i);
    for (int t = 1; t < count; ++t) sum = fma<T>(splat(T(factors[t * step])), load(terms[t] + i), sum);
    store(sum, out + i);
  }
}
template <class T>
void add_identity(T factor, T* matrix, int64_t h, int64_t ld) {
  for (int64_t i = 0; i < h; ++i) matrix[i * ld + i] += factor;
}

// The largest column sum of |matrix|, NaN where an entry is NaN or infinite.
template <class T>
double norm_of(const T* matrix, int64_t h, int64_t ld) {
  double largest = 0, all = 0;
  for (int64_t j = 0; j < h; j += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < h; ++i) {
      const Vec<T> x = load(matrix + i * ld + j);
      sum += x < 0 ? -x : x;
    }
    for (int lane = 0; lane < kLanes<T> && j + lane < h; ++lane) {
      largest = double(sum[lane]) > largest ? double(sum[lane]) : largest;
      all += double(sum[lane]);
    }
  }
  return all - all == 0 ? largest : all - all;
}

// Squares `y` = e^A `times` times, without its identity while `reduced`, and writes e^(2^times A).
template <class T>
void square_and_write(T* y, T* other, bool reduced, int times, double norm, const Shape& shape, T* out) {
  const int64_t h = shape.h, ld = shape.ld;
  for (int t = 0; t < times; ++t, norm *= 2) {
    if (reduced && norm > kNearOne) {
      reduced = false;
      add_identity(T(1), y, h, ld);
    }
    multiply<T>(y, y, reduced ? y : nullptr, 2.0, other, shape);
    T* swap = y;
    y = other;
    other = swap;
  }
  if (reduced) add_identity(T(1), y, h, ld);
  for (int64_t i = 0; i < h; ++i) std::memcpy(out + i * h, y + i * ld, size_t(h) * sizeof(T));
}

// e^A of buffers[0] without its identity up to degree 8, whole at degree 18; the answer is one of the buffers.
template <class T>
T* evaluate(int degree, T** buffers, const Shape& shape) {
  const int64_t h = shape.h, ld = shape.ld, size = h * ld;
  T *A = buffers[0], *A2 = buffers[1];
  multiply<T>(A, A, nullptr, 0.0, A2, shape);
  if (degree == 4) {
    constexpr double high[] = {1.0 / 6, 1.0 / 24}, low[] = {1.0, 1.0 / 2};
    combine(buffers, high, 1, 2, buffers[2], size);
    combine(buffers, low, 1, 2, buffers[3], size);
    multiply<T>(A2, buffers[2], buffers[3], 1.0, buffers[4], shape);
    return buffers[4];
  }
  if (degree == 8) {
    constexpr double r = 13.304134695650071, x3 = 2.0 / 3;  // r = √177
    constexpr double fourth[] = {x3 * (1 + r) / 88, x3 * (1 + r) / 352}, low[] = {1.0, (857 - 58 * r) / 630}, left[] = {x3, 1.0};
    constexpr double right[] = {11 * (r - 1) / (1260 * x3), 11 * (r - 9) / (5040 * x3), (89 - r) / (5040 * x3 * x3)};
    combine(buffers, fourth, 1, 2, buffers[3], size);
    multiply<T>(A2, buffers[3], nullptr, 0.0, buffers[2], shape);
    combine(buffers + 1, left, 1, 2, buffers[3], size);
    combine(buffers, right, 1, 3, buffers[4], size);
    add_identity(T((29 * r - 271) / (315 * x3)), buffers[4], h, ld);
    combine(buffers, low, 1, 2, buffers[5], size);
    multiply<T>(buffers[3], buffers[4], buffers[5], 1.0, buffers[6], shape);
    return buffers[6];
  }
  // Of A, A², A³, A⁶, and the identity for b3 and b4.
  constexpr double b1[] = {-1.00365581030144618291e-01, -8.02924648241156932449e-03, -8.92138498045729985177e-04};
  constexpr double b2[] = {3.97849749499645077844e-01, 1.36783778460411720168, 4.98289622525382669416e-01, -6.37898194594723280150e-04};
  constexpr double b3[] = {1.68015813878906206114, 5.71779846478865511061e-02, -6.98210122488052056106e-03, 3.34975017086070470649e-05, 1.0};
  constexpr double b4[] = {-6.76404519071381882256e-02, 6.75961301770459654925e-02, 2.95552570429315521194e-02, -1.39180257516060693404e-05};
  constexpr double b5[] = {-9.23364619367118555360e-02, -1.69364939002081722752e-02, -1.40086798182036094347e-05};
  T *A3 = buffers[2], *A6 = buffers[3], *A9 = buffers[4], *left = buffers[5], *right = buffers[6], *low = buffers[7];
  multiply<T>(A2, A, nullptr, 0.0, A3, shape);
  multiply<T>(A3, A3, nullptr, 0.0, A6, shape);
  combine(buffers, b1, 1, 3, left, size);
  combine(buffers + 1, b5, 1, 3, right, size);
  combine(buffers, b4, 1, 4, low, size);
  add_identity(T(-9.04316832390810593223e-02), low, h, ld);
  multiply<T>(left, right, low, 1.0, A9, shape);
  combine(buffers, b3, 1, 5, left, size);
  add_identity(T(-1.09676396052962061844e+01), left, h, ld);
  combine(buffers, b2, 1, 4, low, size);
  multiply<T>(left, A9, low, 1.0, right, shape);
  return right;
}

// e^A and e^-A of buffers[0] without their identity, into buffers[1] and buffers[2]; buffers[3] is free afterwards.
template <class T>
void evaluate_pair(int degree, T** buffers, const Shape& shape) {
  const int64_t size = shape.h * shape.ld;
  T *A = buffers[0], *high = buffers[1], *odd = buffers[2], *even = buffers[3], *low = buffers[4], **powers = buffers + 5;
  // Degrees 9, 13 and 17 split each part in two: low powers, and the highest one times a second run.
  const bool split = degree > 5;
  const int count = split ? degree / 4 : degree / 2;
  multiply<T>(A, A, nullptr, 0.0, powers[0], shape);
  for (int p = 1; p < count; ++p) multiply<T>(powers[p / 2], powers[p - 1 - p / 2], nullptr, 0.0, powers[p], shape);
  auto part = [&](int first, T* out) {
    combine(powers, kInverseFactorial + first, 2, count, split ? low : out, size);
    if (!split) return;
    combine(powers, kInverseFactorial + first + 2 * count, 2, count, high, size);
    multiply<T>(powers[count - 1], high, low, 1.0, out, shape);
  };
  // Σ A^2i / (2i)! and A Σ A^2i / (2i + 1)!.
  part(2, even);
  part(3, odd);
  multiply<T>(A, odd, A, 1.0, low, shape);
  T* const terms[] = {even, low};
  constexpr double sum[] = {1.0, 1.0}, difference[] = {1.0, -1.0};
  combine(terms, sum, 1, 2, high, size);
  combine(terms, difference, 1, 2, odd, size);
}

// Whether the matrix is its own transpose, bit for bit: then so is every polynomial of it, and half of it is enough.
template <class T>
bool is_symmetric(const T* matrix, int64_t h) {
  for (int64_t i = 0; i < h; ++i)
    for (int64_t j = 0; j < i; ++j)
      if (matrix[i * h + j] != matrix[j * h + i]) return false;
  return true;
}

template <class T>
void exponential(const T* matrix, T* plus, T* minus, int64_t h, void* scratch) {
  const int64_t ld = row_length<T>(h), size = h * ld;
  if (h == 1) {
    *plus = T(__builtin_exp(double(*matrix)));
    if (minus) *minus = T(__builtin_exp(-double(*matrix)));
    return;
  }
  T* buffers[9];
  for (int i = 0; i < 9; ++i) buffers[i] = static_cast<T*>(scratch) + i * size;
  T* A = buffers[0];
  pad_rows(matrix, A, h, ld);
  double norm = norm_of(A, h, ld);
  if (norm != norm) {
    for (int64_t i = 0; i < h * h; ++i) {
      plus[i] = T(norm);
      if (minus) minus[i] = T(norm);
    }
    return;
  }
  // The fewest products; of two equal choices the one with fewer squarings, which double an error.
  const Polynomial *first = minus ? kPair : kOne, *end = minus ? kPair + 5 : kOne + 3, *best = nullptr;
  int squarings = 0, least = 0;
  for (const Polynomial* one = first; one < end; ++one) {
    const double largest = sizeof(T) == 4 ? one->largest_float : one->largest_double;
    int times = 0;
    for (double rest = norm; rest > largest; rest /= 2) ++times;
    const int cost = one->products + times * (minus ? 2 : 1);
    if (best && cost >= least) continue;
    best = one;
    squarings = times;
    least = cost;
  }
  if (squarings) {
    double scale = 1;
    for (int t = 0; t < squarings; ++t) scale /= 2;
    norm *= scale;
    for (int64_t i = 0; i < size; i += kLanes<T>) store(splat(T(scale)) * load(A + i), A + i);
  }
  // One strip has no half to leave out.
  // From 17 on at every instruction set: AVX-512's strips of 32 floats save nothing before, but the result is symmetric to the bit.
  constexpr int64_t narrow = kStrip<T> < 16 ? kStrip<T> : 16;
  const Shape shape = {h, ld, h > narrow && is_symmetric(matrix, h)};
  if (!minus) {
    T* y = evaluate(best->degree, buffers, shape);
    return square_and_write(y, buffers[8], best->degree != 18, squarings, norm, shape, plus);
  }
  evaluate_pair(best->degree, buffers, shape);
  square_and_write(buffers[1], buffers[3], true, squarings, norm, shape, plus);
  square_and_write(buffers[2], buffers[3], true, squarings, norm, shape, minus);
}

template <class T>
void exponentials(const ExpItem& item) {
  const int64_t h = item.h, size = h * h;
  const T* matrices = static_cast<const T*>(item.matrices);
  T *plus = static_cast<T*>(item.plus), *minus = static_cast<T*>(item.minus);
  if (h == 2 || h == 3) {
    const auto tiny = h == 2 ? &tiny_exp<T, 2> : &tiny_exp<T, 3>;
    for (int64_t i = 0; i < item.count; i += kLanes<T>) {
      const int count = int(item.count - i < kLanes<T> ? item.count - i : kLanes<T>);
      tiny(matrices + i * size, count, T(1), plus + i * size);
      if (minus) tiny(matrices + i * size, count, T(-1), minus + i * size);
    }
    return;
  }
  for (int64_t i = 0; i < item.count; ++i)
    exponential(matrices + i * size, plus + i * size, minus ? minus + i * size : nullptr, h, item.scratch);
}

}  // namespace

void exp_item(const ExpItem& item, bool is_double) {
  if (is_double) exponentials<double>(item);
  else exponentials<float>(item);
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
