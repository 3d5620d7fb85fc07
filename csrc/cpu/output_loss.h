// The losses whose derivatives data_dependent_steps_ knows: mean cross entropy of labels, and ½‖Y − targets‖².
#pragma once

#include <cmath>

#include "blas.h"

namespace teleport_fast {

// Y, E and R are (outputs, batch); `p` (outputs, batch) and `column` (batch) are scratch that stays between the two calls.
template <class T>
struct OutputLoss {
  const int64_t* labels = nullptr;  // (batch), or null for squared error
  Matrix<T> targets, p;
  T* column = nullptr;

  // The loss; E = dL/dY.
  double gradient(const Matrix<T>& Y, const Matrix<T>& E) const {
    const int64_t n = Y.rows, batch = Y.cols;
    double loss = 0;
    if (!labels) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < batch; ++j) {
          const T e = Y.data[i * Y.ld + j] - targets.data[i * targets.ld + j];
          E.data[i * E.ld + j] = e;
          loss += 0.5 * double(e) * double(e);
        }
      return loss;
    }
    // Row by row, so that all columns advance together.
    T* most = column;
    for (int64_t j = 0; j < batch; ++j) most[j] = Y.data[j];
    for (int64_t i = 1; i < n; ++i)
      for (int64_t j = 0; j < batch; ++j) most[j] = most[j] < Y.data[i * Y.ld + j] ? Y.data[i * Y.ld + j] : most[j];
    for (int64_t j = 0; j < batch; ++j) loss -= double(Y.data[labels[j] * Y.ld + j] - most[j]);
    T* sum = column + batch;
    for (int64_t j = 0; j < batch; ++j) sum[j] = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < batch; ++j) sum[j] += p.data[i * p.ld + j] = std::exp(Y.data[i * Y.ld + j] - most[j]);
    for (int64_t j = 0; j < batch; ++j) {
      loss += std::log(double(sum[j]));
      sum[j] = 1 / sum[j];
    }
    const T mean = 1 / T(batch);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < batch; ++j) {
        p.data[i * p.ld + j] *= sum[j];
        E.data[i * E.ld + j] = p.data[i * p.ld + j] * mean;
      }
    for (int64_t j = 0; j < batch; ++j) E.data[labels[j] * E.ld + j] -= mean;
    return loss / double(batch);
  }

  // The loss's Hessian at the last Y, times R.
  void hessian_product(const Matrix<T>& R, const Matrix<T>& out) const {
    const int64_t n = R.rows, batch = R.cols;
    const T mean = 1 / T(batch);
    if (!labels) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < batch; ++j) out.data[i * out.ld + j] = R.data[i * R.ld + j];
      return;
    }
    T* sum = column;
    for (int64_t j = 0; j < batch; ++j) sum[j] = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < batch; ++j) sum[j] += out.data[i * out.ld + j] = p.data[i * p.ld + j] * R.data[i * R.ld + j] * mean;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < batch; ++j) out.data[i * out.ld + j] -= p.data[i * p.ld + j] * sum[j];
  }
};

}  // namespace teleport_fast
