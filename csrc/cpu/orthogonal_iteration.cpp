// orthogonal_iteration_ on the CPU: the image's rows by blocked Householder reflectors, whose products are the BLAS'.
#include "orthogonal_iteration.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../ops.h"
#include "blas.h"
#include "host.h"

namespace teleport_fast {
namespace {

// As the shift of the reference: what no gradient has seen stays near where it is.
template <class T>
T shift_of(const T* covariance, int64_t h) {
  T sum = 0;
  for (int64_t i = 0; i < h; ++i) sum += covariance[i * (h + 1)];
  constexpr T eps = std::numeric_limits<T>::epsilon();
  return 100 * eps * (sum / T(h)) + std::numeric_limits<T>::min() / eps;
}

// One matrix: the pieces of its scratch, whose size without memory is what must be allocated, and the steps in order.
template <class T>
struct Iteration {
  int64_t h, ld, bytes = 0;
  T *X, *V, *factors, *products[2], *signs;

  Iteration(int64_t h, void* memory) : h(h), ld((h + kRowPadding + 15) / 16 * 16) {
    const int64_t panels = (h + kPanelRows - 1) / kPanelRows;
    const int64_t sizes[] = {(h + 1) * ld, (h + 1) * ld, panels * kPanelRows * kPanelRows, h * kPanelRows, h * kPanelRows, h};
    T** places[] = {&X, &V, &factors, &products[0], &products[1], &signs};
    for (int i = 0; i < 6; ++i) {
      *places[i] = memory ? static_cast<T*>(memory) + bytes / int64_t(sizeof(T)) : nullptr;
      bytes += (sizes[i] + 15) / 16 * 16 * int64_t(sizeof(T));
    }
  }

  Matrix<T> of(T* data, int64_t row, int64_t column, int64_t rows, int64_t columns) const {
    return {data + row * ld + column, rows, columns, ld};
  }

  // X = R (C + shift), rows scaled to a largest entry of 1, which leaves the factor as it is; false where an entry is not finite.
  bool image(const T* covariance, const T* basis) {
    std::memset(X, 0, size_t((h + 1) * ld) * sizeof(T));
    const T shift = shift_of(covariance, h);
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = 0; j < h; ++j) X[i * ld + j] = shift * basis[i * h + j];
    auto whole = [&](const T* data) { return Matrix<T>{const_cast<T*>(data), h, h, h}; };
    product(whole(basis), As::Is, whole(covariance), As::Is, of(X, 0, 0, h, h), T(1), T(1));
    for (int64_t i = 0; i < h; ++i) {
      T largest = 0, sum = 0;
      for (int64_t j = 0; j < h; ++j) {
        largest = std::max(largest, std::abs(X[i * ld + j]));
        sum += X[i * ld + j] - X[i * ld + j];
      }
      if (!(sum == 0)) return false;
      if (largest > 0)
        for (int64_t j = 0; j < h; ++j) X[i * ld + j] /= largest;
    }
    return true;
  }

  // to -= (to Vᵀ) T V, T transposed on the way back; the rows from `row` on, and the columns from the panel's first on.
  void apply(int64_t first, int64_t count, T* to, int64_t row, As t) {
    const int64_t rows = h - row, length = h - first;
    const Matrix<T> reflectors = of(V, first, first, count, length), target = of(to, row, first, rows, length);
    const Matrix<T> factor{factors + first / kPanelRows * kPanelRows * kPanelRows, count, count, kPanelRows};
    const Matrix<T> one{products[0], rows, count, kPanelRows}, two{products[1], rows, count, kPanelRows};
    product(target, As::Is, reflectors, As::Transposed, one);
    product(one, As::Is, factor, t, two);
    product(two, As::Is, reflectors, As::Is, target, T(-1), T(1));
  }

  void run(const T* covariance, T* basis, T* turn) {
    if (!image(covariance, basis)) {
      for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < h; ++j) turn[i * h + j] = T(i == j);
      return;
    }
    std::memset(V, 0, size_t((h + 1) * ld) * sizeof(T));
    const auto kernel = select_reflect_panel();
    for (int64_t first = 0; first < h; first += kPanelRows) {
      const int64_t count = std::min(kPanelRows, h - first), corner = first * (ld + 1);
      kernel({X + corner, V + corner, factors + first * kPanelRows, signs + first, ld, count, h - first}, sizeof(T) == 8);
      if (first + count < h) apply(first, count, X, first + count, As::Is);
    }
    // Q is the reflectors' product backwards; a panel leaves the rows before it as they are.
    std::memset(X, 0, size_t(h * ld) * sizeof(T));
    for (int64_t i = 0; i < h; ++i) X[i * (ld + 1)] = 1;
    for (int64_t first = (h - 1) / kPanelRows * kPanelRows; first >= 0; first -= kPanelRows)
      apply(first, std::min(kPanelRows, h - first), X, first, As::Transposed);
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = 0; j < h; ++j) X[i * ld + j] *= signs[i];
    product(of(X, 0, 0, h, h), As::Is, Matrix<T>{basis, h, h, h}, As::Transposed, Matrix<T>{turn, h, h, h});
    for (int64_t i = 0; i < h; ++i) std::memcpy(basis + i * h, X + i * ld, size_t(h) * sizeof(T));
  }
};

void check(const Tensor& tensor, int64_t h, bool is_double, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.dim() == 3 && tensor.size(1) == h && tensor.size(2) == h &&
          tensor.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
      "orthogonal_iteration_: ", name, " must be contiguous (n, ", h, ", ", h, ") on the CPU, all float32 or all float64");
}

}  // namespace

void orthogonal_iteration_(std::vector<Tensor> bases, std::vector<Tensor> covariances, Tensor turns) {
  STD_TORCH_CHECK(bases.size() == covariances.size() && turns.dim() == 3, "orthogonal_iteration_: the lists must be of one length");
  const int64_t h = turns.size(2);
  const bool is_double = turns.scalar_type() == ScalarType::Double;
  struct Item {
    char *covariance, *basis, *turn;
  };
  std::vector<Item> items;
  check(turns, h, is_double, "turns");
  const int64_t bytes = h * h * (is_double ? 8 : 4);
  char* turn = static_cast<char*>(turns.data_ptr());
  for (size_t i = 0; i < bases.size(); ++i) {
    check(bases[i], h, is_double, "a basis");
    check(covariances[i], h, is_double, "a covariance");
    STD_TORCH_CHECK(bases[i].size(0) == covariances[i].size(0), "orthogonal_iteration_: a covariance per basis");
    for (int64_t head = 0; head < bases[i].size(0); ++head)
      items.push_back(
          {static_cast<char*>(covariances[i].data_ptr()) + head * bytes, static_cast<char*>(bases[i].data_ptr()) + head * bytes,
           turn + int64_t(items.size()) * bytes});
  }
  STD_TORCH_CHECK(int64_t(items.size()) == turns.size(0), "orthogonal_iteration_: turns must be one per basis and head");
  if (h == 0 || items.empty()) return;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (7 * h * h * h));
  const int64_t scratch_bytes = is_double ? Iteration<double>(h, nullptr).bytes : Iteration<float>(h, nullptr).bytes;
  parallel_for(int64_t(items.size()), grain, scratch_bytes, [&](int64_t begin, int64_t end, void* memory) {
    auto run = [&](auto zero) {
      using T = decltype(zero);
      Iteration<T> iteration(h, memory);
      for (int64_t i = begin; i < end; ++i)
        iteration.run(
            reinterpret_cast<const T*>(items[i].covariance), reinterpret_cast<T*>(items[i].basis), reinterpret_cast<T*>(items[i].turn));
    };
    if (is_double) run(0.0);
    else run(0.0f);
  });
}

}  // namespace teleport_fast
