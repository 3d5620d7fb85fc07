// H⁺ of a hidden layer's outputs H (k, B) with full row rank: by the Cholesky factor of HHᵀ where k < B, by LU where k = B.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "blas.h"

namespace teleport_fast {

// ⟨A, B⟩ in eight sums, so that no addition waits for the one before.
template <class T>
NOINLINE double dot(const Matrix<T>& A, const Matrix<T>& B) {
  T sums[8] = {};
  for (int64_t i = 0; i < A.rows; ++i) {
    const T *a = A.data + i * A.ld, *b = B.data + i * B.ld;
    int64_t j = 0;
    for (; j + 8 <= A.cols; j += 8)
      for (int lane = 0; lane < 8; ++lane) sums[lane] += a[j + lane] * b[j + lane];
    for (; j < A.cols; ++j) sums[0] += a[j] * b[j];
  }
  double sum = 0;
  for (const T part : sums) sum += double(part);
  return sum;
}

template <class T>
double squares(const Matrix<T>& A) {
  return dot(A, A);
}

template <class T>
NOINLINE void copy(const Matrix<T>& from, const Matrix<T>& to) {
  for (int64_t i = 0; i < from.rows; ++i) std::memcpy(to.data + i * to.ld, from.data + i * from.ld, size_t(from.cols) * sizeof(T));
}

// Eight columns of Gaussians, the same at every call, as rows: ‖H⁻¹ω‖ falls under ‖H⁻¹‖/100 with probability 0.8%, of all with 2e-17.
constexpr int64_t kProbes = 8;
template <class T>
void gaussian(const Matrix<T>& probes) {
  uint64_t state = 0x9e3779b97f4a7c15u;
  auto uniform = [&] {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double(state >> 11) + 0.5) * 0x1p-53;
  };
  for (int64_t i = 0; i < probes.rows; ++i)
    for (int64_t j = 0; j < probes.cols; ++j)
      probes.data[i * probes.ld + j] = T(std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()));
}

// Largest condition numbers in the Frobenius norm that are taken: of HHᵀ, and of a square H.
struct Limits {
  double gram, square;
};

template <class T>
struct RightInverse {
  Matrix<T> H, factor;  // factor (k, k): (HHᵀ)⁻¹, or the LU of Hᵀ as Fortran reads H's memory
  std::vector<int> pivots;
  bool square = false;
  double condition = 0;  // of a square H, probed

  // False: singular, not finite, or conditioned beyond the limits; `work` holds at least k * max(k, kProbes) elements.
  bool of(const Matrix<T>& H_, T* work, const Limits& limits) {
    H = H_;
    const int64_t k = H.rows;
    const int n = int(k), ld = int(factor.ld);
    int info = 0;
    square = k == H.cols;
    if (square) {
      copy(H, factor);
      pivots.resize(size_t(k));
      Blas<T>::getrf(&n, &n, factor.data, &ld, pivots.data(), &info);
      if (info) return false;
      const Matrix<T> probes{work, kProbes, k, k};
      gaussian(probes);
      solve(probes, "N");
      double inverse = 0;
      for (int64_t i = 0; i < kProbes; ++i) inverse = std::fmax(inverse, squares(Matrix<T>{work + i * k, 1, k, k}));
      condition = std::sqrt(squares(H)) * std::sqrt(inverse);
      return condition <= limits.square;
    }
    product(H, As::Is, H, As::Transposed, factor);
    const double gram = std::sqrt(squares(factor));
    Blas<T>::potrf("U", &n, factor.data, &ld, &info);
    if (info) return false;
    Blas<T>::potri("U", &n, factor.data, &ld, &info);
    if (info) return false;
    // Fortran's upper triangle is the lower one here.
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < i; ++j) factor.data[j * factor.ld + i] = factor.data[i * factor.ld + j];
    return gram * std::sqrt(squares(factor)) <= limits.gram;
  }

  // A H⁺ (n, k) from A (n, B); `work` (n, k), unused where H is square.
  void right(const Matrix<T>& A, const Matrix<T>& out, T* work) const {
    if (square) {
      copy(A, out);
      return solve(out, "N");
    }
    const Matrix<T> half{work, A.rows, H.rows, H.rows};
    product(A, As::Is, H, As::Transposed, half);
    product(half, As::Is, factor, As::Is, out);
  }

  // K H⁺ᵀ (n, B) from K (n, k), times alpha and added to beta out where H is wide; `work` (n, k).
  void right_transposed(const Matrix<T>& K, const Matrix<T>& out, T* work, T alpha = 1, T beta = 0) const {
    if (square) {
      copy(K, out);
      return solve(out, "T");
    }
    const Matrix<T> half{work, K.rows, H.rows, H.rows};
    product(K, As::Is, factor, As::Is, half);
    product(half, As::Is, H, As::Is, out, alpha, beta);
  }

 private:
  void solve(const Matrix<T>& rows, const char* transposed) const {
    const int n = int(rows.cols), count = int(rows.rows), ld = int(factor.ld), ldr = int(rows.ld);
    int info = 0;
    Blas<T>::getrs(transposed, &n, &count, factor.data, &ld, pivots.data(), rows.data, &ldr, &info);
  }
};

}  // namespace teleport_fast
