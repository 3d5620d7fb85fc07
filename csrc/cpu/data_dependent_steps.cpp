// data_dependent_steps_ on the CPU: whole steps of the published V-exact teleport in one call, on memory taken once.
//
// Formulas as in teleport_fast/ops/data_dependent_steps.py. Where the first hidden layer is as wide as the batch, H⁺ is H⁻¹:
// K_1 H⁺ᵀ is RE_1 + Y with Y = E_1 Rh_0ᵀ H⁻ᵀ, and K_1 W_1ᵀ is (RE_1 + Y)Z_1ᵀ, so that K_1 is never formed.
#include <algorithm>
#include <cmath>

#include "../ops.h"
#include "host.h"
#include "output_loss.h"
#include "right_inverse.h"

namespace teleport_fast {
namespace {

// Rows a power of two apart compete for the same lines of the cache: 512 by 512 products run a tenth faster with longer ones.
int64_t padded(int64_t columns) { return columns >= 256 && columns % 64 == 0 ? columns + 8 : columns; }

template <class T>
Matrix<T> matrix_of(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.size(1)};
}

// σ of LeakyReLU, its derivative times G, and a sum, in place or not.
template <class T>
NOINLINE void activate(const Matrix<T>& Z, const Matrix<T>& H, T slope) {
  for (int64_t i = 0; i < Z.rows; ++i) {
    const T* z = Z.data + i * Z.ld;
    T* h = H.data + i * H.ld;
    for (int64_t j = 0; j < Z.cols; ++j) h[j] = z[j] * (z[j] > 0 ? T(1) : slope);
  }
}

template <class T>
NOINLINE void pull(const Matrix<T>& G, const Matrix<T>& Z, T slope) {
  for (int64_t i = 0; i < Z.rows; ++i) {
    const T* z = Z.data + i * Z.ld;
    T* g = G.data + i * G.ld;
    for (int64_t j = 0; j < Z.cols; ++j) g[j] *= z[j] > 0 ? T(1) : slope;
  }
}

template <class T>
NOINLINE void add(const Matrix<T>& A, T factor, const Matrix<T>& to) {
  for (int64_t i = 0; i < A.rows; ++i)
    for (int64_t j = 0; j < A.cols; ++j) to.data[i * to.ld + j] += factor * A.data[i * A.ld + j];
}

// Up to this condition number lead is h H⁻¹ of the stale h and the first H, a product a step less, off by 1e-16 times it.
constexpr double kLeadAtEnd = 1e6;

struct Settings {
  double slope, scale, cap;
  Limits limits;
};

// A matrix that steps multiply from the left.
template <class T>
struct Turned : Matrix<T> {
  T* spare = nullptr;

  void turn(const Matrix<T>& g) {
    product(g, As::Is, *this, As::Is, Matrix<T>{spare, this->rows, this->cols, this->ld});
    std::swap(this->data, spare);
  }
};

// A layer's matrices, (width, B) unless said; of the outputs' layer only what has a meaning is allocated.
template <class T>
struct Layer {
  Matrix<T> H, E, Rh, RE;  // Rh holds RZ before σ' comes on it
  Matrix<T> G, K;         // (width, width below), as W: the weight that gives Z
  Matrix<T> g;            // (width, width)
  Turned<T> Z, W;
  Turned<T> stale, lead;  // H as the published loop keeps it: lead stale, lead (width, width) or none
  RightInverse<T> inverse;
};

template <class T>
class Loop {
 public:
  Loop(const Tensor& Z0, const std::vector<Tensor>& tail, const Tensor& gram, const Settings& settings)
      : settings_(settings), slope_(T(settings.slope)), joints_(tail.size()), batch_(Z0.size(1)), layers_(tail.size() + 1) {
    int64_t widest = 0, outputs = 0;
    for (size_t m = 0; m <= joints_; ++m) {
      const int64_t k = m ? tail[m - 1].size(0) : Z0.size(0);
      widest = std::max(widest, k);
      outputs = k;
      Layer<T>& layer = layers_[m];
      layer.Z = take_twice(k, batch_);
      for (Matrix<T>* matrix : {&layer.E, &layer.Rh, &layer.RE}) *matrix = take(k, batch_);
      if (m < joints_) {
        layer.H = take(k, batch_);
        for (Matrix<T>* matrix : {&layer.g, &layer.inverse.factor}) *matrix = take(k, k);
      }
      if (m) {
        layer.W = take_twice(k, layers_[m - 1].Z.rows);
        for (Matrix<T>* matrix : {&layer.G, &layer.K}) *matrix = take(k, layers_[m - 1].Z.rows);
      }
    }
    square_ = layers_[0].Z.rows == batch_;
    for (Matrix<T>& matrix : wide_) matrix = take(widest, batch_);
    // Room for any (width, width) with its padding, and for a factor's probes.
    for (Matrix<T>& matrix : narrow_) matrix = take(widest, widest + kProbes);
    gram_ = take(batch_, batch_);
    loss_.p = take(outputs, batch_);
    loss_.column = take(2, batch_).data;
    copy(matrix_of<T>(Z0), layers_[0].Z);
    copy(matrix_of<T>(gram), gram_);
    for (size_t m = 1; m <= joints_; ++m) copy(matrix_of<T>(tail[m - 1]), layers_[m].W);
    for (size_t m = 0; m + 1 < joints_; ++m) {
      // Two reads and one turn of lead stale cost less with the factors apart where the batch is large.
      const int64_t k = layers_[m].Z.rows, readers = layers_[m + 1].Z.rows;
      layers_[m].stale = take_twice(k, batch_);
      if (batch_ > 2 * readers + (m ? k : 0)) layers_[m].lead = take_twice(k, k);
    }
    if (!layers_[0].lead.data) first_lead_ = take_twice(layers_[0].Z.rows, layers_[0].Z.rows);
  }

  void set_target(const Tensor& target) {
    if (target.scalar_type() == ScalarType::Long) loss_.labels = static_cast<const int64_t*>(target.data_ptr());
    else loss_.targets = matrix_of<T>(target);
  }

  // Rows (loss, J) into trace, T of every step into Ts; false where a matrix is not well enough of full row rank.
  bool run(const std::vector<Tensor>& Ts, double* trace) {
    activate(layers_[0].Z, layers_[0].H, slope_);
    forward();
    for (size_t m = 0; m + 1 < joints_; ++m) copy(layers_[m].H, layers_[m].stale);
    if (!factor(0, layers_[0].H)) return false;
    lead_at_end_ = first_lead_.data && square_ && joints_ > 1 && layers_[0].inverse.condition < kLeadAtEnd;
    if (lead_at_end_) {
      start_ = layers_[0].inverse;
      start_.factor = take(batch_, batch_);
      copy(layers_[0].inverse.factor, start_.factor);
    }
    const int64_t steps = Ts[0].size(0);
    for (int64_t step = 0;; ++step) {
      trace[2 * step] = backward(&trace[2 * step + 1]);
      if (step == steps || settings_.cap < trace[2 * step + 1]) return true;
      hessian_product();
      for (size_t m = 0; m < joints_; ++m) {
        const int64_t k = layers_[m].Z.rows;
        const Matrix<T> t{static_cast<T*>(Ts[m].data_ptr()) + step * k * k, k, k, k};
        if (!m) first_joint(t);
        else if (!later_joint(m, t, step == 0)) return false;
        identity_plus(t, layers_[m].g);
      }
      if (!move(step == 0)) return false;
      turn_stale(step == 0, step + 1 == steps);
      forward();
    }
  }

  void write(const Tensor& Z0, const std::vector<Tensor>& tail, const Tensor& lead, const Tensor& outputs) const {
    copy(layers_[0].Z, matrix_of<T>(Z0));
    for (size_t m = 1; m <= joints_; ++m) copy(layers_[m].W, matrix_of<T>(tail[m - 1]));
    if (lead_at_end_) start_.right(layers_[0].stale, first_lead_, nullptr);
    copy(layers_[0].lead.data ? layers_[0].lead : first_lead_, matrix_of<T>(lead));
    copy(layers_[joints_].Z, matrix_of<T>(outputs));
  }

 private:
  Matrix<T> take(int64_t rows, int64_t cols) {
    const int64_t ld = padded(cols);
    memory_.push_back(allocate(rows * ld * int64_t(sizeof(T))));
    return {static_cast<T*>(memory_.back().get()), rows, cols, ld};
  }

  Turned<T> take_twice(int64_t rows, int64_t cols) {
    Turned<T> turned;
    static_cast<Matrix<T>&>(turned) = take(rows, cols);
    turned.spare = take(rows, cols).data;
    return turned;
  }

  Matrix<T> wide(int i, int64_t rows) const { return {wide_[i].data, rows, batch_, wide_[i].ld}; }
  Matrix<T> narrow(int i, int64_t rows, int64_t cols) const { return {narrow_[i].data, rows, cols, padded(cols)}; }

  static void identity_plus(const Matrix<T>& t, const Matrix<T>& g) {
    copy(t, g);
    for (int64_t i = 0; i < g.rows; ++i) g.data[i * g.ld + i] += 1;
  }

  bool factor(size_t m, const Matrix<T>& H) { return layers_[m].inverse.of(H, narrow_[0].data, settings_.limits); }

  // W lead h of the layer that W reads.
  void read_stale(size_t m, const Matrix<T>& W, const Matrix<T>& Z, bool fresh) const {
    const Layer<T>& below = layers_[m - 1];
    if (!below.lead.data || fresh) return product(W, As::Is, below.stale, As::Is, Z);
    const Matrix<T> led = narrow(1, W.rows, W.cols);
    product(W, As::Is, below.lead, As::Is, led);
    product(led, As::Is, below.stale, As::Is, Z);
  }

  void forward() {
    for (size_t m = 1; m <= joints_; ++m) {
      product(layers_[m].W, As::Is, layers_[m - 1].H, As::Is, layers_[m].Z);
      if (m < joints_) activate(layers_[m].Z, layers_[m].H, slope_);
    }
  }

  double backward(double* J) {
    const double loss = loss_.gradient(layers_[joints_].Z, layers_[joints_].E);
    double sum = 0;
    for (size_t m = joints_; m-- > 0;) {
      const Layer<T>&layer = layers_[m], &above = layers_[m + 1];
      product(above.E, As::Is, layer.H, As::Transposed, above.G);
      sum += squares(above.G);
      product(above.W, As::Transposed, above.E, As::Is, layer.E);
      pull(layer.E, layer.Z, slope_);
    }
    // RZ of the first layer: ∇L's part of the first weight, times X.
    product(layers_[0].E, As::Is, gram_, As::Is, layers_[0].Rh);
    *J = sum + dot(layers_[0].Rh, layers_[0].E);
    return loss;
  }

  void hessian_product() {
    for (size_t m = 0; m < joints_; ++m) {
      const Layer<T>& layer = layers_[m];
      Layer<T>& above = layers_[m + 1];
      pull(layer.Rh, layer.Z, slope_);
      product(above.W, As::Is, layer.Rh, As::Is, above.Rh);
      product(above.G, As::Is, layer.H, As::Is, above.Rh, T(1), T(1));
    }
    loss_.hessian_product(layers_[joints_].Rh, layers_[joints_].RE);
    for (size_t m = joints_; m-- > 0;) {
      const Layer<T>&layer = layers_[m], &above = layers_[m + 1];
      // Of the first joint's K_U a square H asks only for the second term.
      product(above.E, As::Is, layer.Rh, As::Transposed, above.K);
      if (m || !square_) product(above.RE, As::Is, layer.H, As::Transposed, above.K, T(1), T(1));
      if (!m) break;
      product(above.G, As::Transposed, above.E, As::Is, layer.RE);
      product(above.W, As::Transposed, above.RE, As::Is, layer.RE, T(1), T(1));
      pull(layer.RE, layer.Z, slope_);
    }
  }

  // T_0 = scale [σ' ⊙ (GᵀE + Uᵀ(RE − K_U H⁺ᵀ))]Z₀ᵀ; of RE, RE + Y is left where H is square.
  void first_joint(const Matrix<T>& t) {
    const Layer<T>&layer = layers_[0], &above = layers_[1];
    const Matrix<T> below = wide(0, layer.Z.rows);
    product(above.G, As::Transposed, above.E, As::Is, below);
    if (square_) {
      const Matrix<T> Y = wide(1, above.Z.rows);
      layer.inverse.right_transposed(above.K, Y, narrow_[0].data);
      product(above.W, As::Transposed, Y, As::Is, below, T(-1), T(1));
      add(Y, T(1), above.RE);
    } else {
      layer.inverse.right_transposed(above.K, above.RE, narrow_[0].data, T(-1), T(1));
      product(above.W, As::Transposed, above.RE, As::Is, below, T(1), T(1));
    }
    pull(below, layer.Z, slope_);
    product(below, As::Is, layer.Z, As::Transposed, t, T(settings_.scale));
  }

  // T_m = scale [K_V Vᵀ − (σ'(Z) ⊙ (Uᵀ K_U H⁺ᵀ))Zᵀ], Z = V lead h.
  bool later_joint(size_t m, const Matrix<T>& t, bool fresh) {
    const Layer<T>&layer = layers_[m], &above = layers_[m + 1];
    const Matrix<T> own = layer.Z, Z = fresh ? own : wide(0, own.rows), H = fresh ? layer.H : wide(1, own.rows);
    if (!fresh) {
      read_stale(m, layer.W, Z, false);
      activate(Z, H, slope_);
    }
    if (!factor(m, H)) return false;
    const T scale = T(settings_.scale);
    const Matrix<T> solved = wide(2, above.Z.rows), pulled = wide(3, own.rows);
    layer.inverse.right_transposed(above.K, solved, narrow_[0].data);
    product(above.W, As::Transposed, solved, As::Is, pulled);
    pull(pulled, Z, slope_);
    if (m > 1 || !square_) {
      product(layer.K, As::Is, layer.W, As::Transposed, t, scale);
    } else if (fresh) {
      add(layer.RE, T(-1), pulled);
    } else {
      product(layer.RE, As::Is, own, As::Transposed, t, scale);
    }
    product(pulled, As::Is, Z, As::Transposed, t, -scale, m > 1 || !square_ || !fresh ? T(1) : T(0));
    return true;
  }

  // V → gV, U → Uσ(Z)σ(gZ)⁺ pair by pair; at the first pair Uσ(Z) is the layer's Z.
  bool move(bool fresh) {
    layers_[0].Z.turn(layers_[0].g);
    activate(layers_[0].Z, layers_[0].H, slope_);
    if (!factor(0, layers_[0].H)) return false;
    layers_[0].inverse.right(layers_[1].Z, layers_[1].W, narrow_[0].data);
    for (size_t m = 1; m < joints_; ++m) {
      Layer<T>&layer = layers_[m], &above = layers_[m + 1];
      const Matrix<T> Z = wide(0, layer.Z.rows), H = wide(1, layer.Z.rows), U = wide(2, above.Z.rows);
      read_stale(m, layer.W, Z, fresh);
      activate(Z, H, slope_);
      product(above.W, As::Is, H, As::Is, U);
      product(layer.g, As::Is, Z, As::Is, H);
      activate(H, H, slope_);
      layer.W.turn(layer.g);
      if (!factor(m, H)) return false;
      layer.inverse.right(U, above.W, narrow_[0].data);
    }
    if (!lead_at_end_) lead_on(layers_[0].g, layers_[0].lead.data ? layers_[0].lead : first_lead_, fresh);
    return true;
  }

  // Stale h → g h; the first layer's lead turned with its Z.
  void turn_stale(bool fresh, bool last) {
    for (size_t m = 0; m + 1 < joints_; ++m) {
      if (last && !(m == 0 && lead_at_end_)) continue;
      if (!layers_[m].lead.data) layers_[m].stale.turn(layers_[m].g);
      else if (m) lead_on(layers_[m].g, layers_[m].lead, fresh);
    }
  }

  static void lead_on(const Matrix<T>& g, Turned<T>& lead, bool fresh) {
    if (fresh) copy<T>(g, lead);
    else lead.turn(g);
  }

  const Settings settings_;
  const T slope_;
  const size_t joints_;
  const int64_t batch_;
  bool square_ = false, lead_at_end_ = false;
  std::vector<Scratch> memory_;
  std::vector<Layer<T>> layers_;
  Matrix<T> gram_, wide_[4], narrow_[2];
  Turned<T> first_lead_;
  RightInverse<T> start_;
  OutputLoss<T> loss_;
};

template <class T>
bool steps_of(
    const Tensor& Z0, const std::vector<Tensor>& tail, const Tensor& gram, const Tensor& target, const Tensor& lead,
    const std::vector<Tensor>& Ts, const Tensor& outputs, double* trace, const Settings& settings) {
  Loop<T> loop(Z0, tail, gram, settings);
  loop.set_target(target);
  if (!loop.run(Ts, trace)) return false;
  loop.write(Z0, tail, lead, outputs);
  return true;
}

void check(const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> shape, const char* name) {
  bool right = tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && size_t(tensor.dim()) == shape.size();
  int64_t axis = 0;
  for (const int64_t size : shape) right = right && tensor.size(axis) == size, ++axis;
  STD_TORCH_CHECK(right, "data_dependent_steps_: ", name, " must be contiguous on the CPU, of the dtype and shape that Z0 and tail give");
}

}  // namespace

void data_dependent_steps_(
    Tensor Z0, std::vector<Tensor> tail, Tensor gram, Tensor target, Tensor lead, std::vector<Tensor> Ts, Tensor outputs, Tensor trace,
    double slope, double scale, double cap, double gram_limit, double square_limit) {
  const ScalarType type = Z0.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, "data_dependent_steps_: Z0 must be float64 or float32");
  STD_TORCH_CHECK(Z0.dim() == 2 && !tail.empty() && Ts.size() == tail.size(), "data_dependent_steps_: Z0 (k, B), one T a weight");
  const int64_t batch = Z0.size(1), steps = Ts[0].size(0);
  check(Z0, type, {Z0.size(0), batch}, "Z0");
  check(gram, type, {batch, batch}, "gram");
  check(lead, type, {Z0.size(0), Z0.size(0)}, "lead");
  check(trace, ScalarType::Double, {steps + 1, 2}, "trace");
  int64_t below = Z0.size(0);
  bool wide_enough = batch > 0;
  for (size_t m = 0; m < tail.size(); ++m) {
    const int64_t width = tail[m].size(0);
    check(tail[m], type, {width, below}, "tail");
    check(Ts[m], type, {steps, below, below}, "Ts");
    wide_enough = wide_enough && below > 0 && below <= batch && width > 0;
    below = width;
  }
  STD_TORCH_CHECK(batch < (int64_t(1) << 30) && below < (int64_t(1) << 30), "data_dependent_steps_: sizes must be below 2^30");
  check(outputs, type, {below, batch}, "outputs");
  if (target.scalar_type() == ScalarType::Long) {
    check(target, ScalarType::Long, {batch}, "target");
    const auto* labels = static_cast<const int64_t*>(target.data_ptr());
    for (int64_t j = 0; j < batch; ++j) 
      STD_TORCH_CHECK(
          labels[j] >= 0 && labels[j] < below, "data_dependent_steps_: target must hold labels in 0..", below - 1, ", got ", labels[j]);
  } else {
    check(target, type, {below, batch}, "target");
  }
  double* rows = static_cast<double*>(trace.data_ptr());
  const auto not_reached = [&] { std::fill(rows, rows + 2 * (steps + 1), -INFINITY); };
  not_reached();
  const Settings settings{slope, scale, cap, {gram_limit, square_limit}};
  const auto run = type == ScalarType::Double ? &steps_of<double> : &steps_of<float>;
  if (!wide_enough || !run(Z0, tail, gram, target, lead, Ts, outputs, rows, settings)) not_reached();
}

}  // namespace teleport_fast
