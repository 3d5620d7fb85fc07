// Row-major products, solves and factorisations by the BLAS and LAPACK that torch itself is linked with.
//
// The symbols are weak: a torch whose libtorch_cpu.so does not export them still loads this library, and blas_present() says so.
#pragma once

#include <cstdint>
#include <utility>

#ifndef NOINLINE
#define NOINLINE __attribute__((noinline))
#endif

#define TELEPORT_FAST_FORTRAN(p, T)                                                                                               \
  void p##gemm_(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*, const T*, const int*, \
                const T*, T*, const int*) __attribute__((weak));                                                                  \
  void p##potrf_(const char*, const int*, T*, const int*, int*) __attribute__((weak));                                            \
  void p##potri_(const char*, const int*, T*, const int*, int*) __attribute__((weak));                                            \
  void p##getrf_(const int*, const int*, T*, const int*, int*, int*) __attribute__((weak));                                       \
  void p##getrs_(const char*, const int*, const int*, const T*, const int*, const int*, T*, const int*, int*) __attribute__((weak));

extern "C" {
TELEPORT_FAST_FORTRAN(d, double)
TELEPORT_FAST_FORTRAN(s, float)
}
#undef TELEPORT_FAST_FORTRAN

namespace teleport_fast {

inline bool blas_present() {
  return &dgemm_ && &sgemm_ && &dpotrf_ && &spotrf_ && &dpotri_ && &spotri_ && &dgetrf_ && &sgetrf_ && &dgetrs_ &&
         &sgetrs_;
}

template <class T>
struct Blas;
template <>
struct Blas<double> {
  static constexpr auto gemm = dgemm_;
  static constexpr auto potrf = dpotrf_;
  static constexpr auto potri = dpotri_;
  static constexpr auto getrf = dgetrf_;
  static constexpr auto getrs = dgetrs_;
};
template <>
struct Blas<float> {
  static constexpr auto gemm = sgemm_;
  static constexpr auto potrf = spotrf_;
  static constexpr auto potri = spotri_;
  static constexpr auto getrf = sgetrf_;
  static constexpr auto getrs = sgetrs_;
};

// Rows are `ld` elements apart; what lies between `cols` and `ld` is nobody's.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t rows = 0, cols = 0, ld = 0;
};

enum class As { Is, Transposed };

// C = alpha op(A) op(B) + beta C.
template <class T>
NOINLINE void product(const Matrix<T>& A, As a, const Matrix<T>& B, As b, const Matrix<T>& C, T alpha = 1, T beta = 0) {
  const int m = int(C.rows), n = int(C.cols), k = int(a == As::Is ? A.cols : A.rows);
  const int lda = int(A.ld), ldb = int(B.ld), ldc = int(C.ld);
  // Fortran sees every matrix transposed: Cᵀ = op(B)ᵀ op(A)ᵀ.
  Blas<T>::gemm(b == As::Is ? "N" : "T", a == As::Is ? "N" : "T", &n, &m, &k, &alpha, B.data, &ldb, A.data, &lda, &beta, C.data, &ldc);
}

}  // namespace teleport_fast
