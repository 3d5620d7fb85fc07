// activation_action for one instruction set: σ while a panel is packed, a product in registers, σ⁻¹ while it is stored.
#include "activation_action.h"
#include "vec.h"

namespace teleport_fast::TELEPORT_FAST_ISA {
namespace {

// to[m * row_step + v] = (Σ_k rows[m * depth + k] strip[k][v]) / (a[m] where the divisor's sign is negative, else 1).
// Tangent: the sign is that of strip[m][v] = σ(z), which is z's own since a > 0; else it is the sum's.
template <class S, class T>
struct Tile {
  const T *rows, *strip, *slope;
  int64_t depth;
  S* to;
  int64_t row_step;
  bool tangent;

  template <int Rows>
  INLINE void run(int64_t first) const {
    Vec<T> sum[Rows][2];
    multiply_tile<T, Rows, 2>(rows + first * depth, depth, 1, strip, depth, sum);
    for (int m = 0; m < Rows; ++m) {
      const Vec<T> a = splat(slope[first + m]);
      for (int v = 0; v < 2; ++v) {
        const Vec<T> y = sum[m][v], sign = tangent ? load(strip + (first + m) * kStrip<T> + v * kLanes<T>) : y;
        store(sign < 0 ? y / a : y, to + (first + m) * row_step + v * kLanes<T>);
      }
    }
  }
};

template <class T>
INLINE void activate(T* strip, const T* slope, int64_t h) {
  for (int64_t k = 0; k < h; ++k) {
    const Vec<T> a = splat(slope[k]);
    for (int v = 0; v < 2; ++v) {
      T* at = strip + k * kStrip<T> + v * kLanes<T>;
      const Vec<T> z = load(at);
      store(z < 0 ? a * z : z, at);
    }
  }
}

// Row tiles outside, strips inside: a tile's rows of the matrix stay in the first cache while the packed panel streams from the second.
template <class S, class T>
struct Rows {
  const ActivationItem& item;
  const T* strips;
  T* spare;
  S* out;

  template <int Count>
  INLINE void run(int64_t first) const {
    const int64_t h = item.h;
    const T *rows = static_cast<const T*>(item.matrix), *slope = static_cast<const T*>(item.slope);
    for (int64_t c = 0; c < item.count; c += kStrip<T>) {
      const T* strip = strips + c * h;
      if (item.count - c >= kStrip<T>) {
        Tile<S, T>{rows, strip, slope, h, out + c, item.out_step, item.tangent}.template run<Count>(first);
        continue;
      }
      Tile<T, T>{rows, strip, slope, h, spare - first * kStrip<T>, kStrip<T>, item.tangent}.template run<Count>(first);
      for (int m = 0; m < Count; ++m)
        for (int64_t v = 0; v < item.count - c; ++v) narrow(spare[m * kStrip<T> + v], out + (first + m) * item.out_step + c + v);
    }
  }
};

template <class S, class T>
void act(const ActivationItem& item) {
  const View& view = *item.Z;
  const int64_t h = item.h;
  T* strips = static_cast<T*>(item.scratch);
  T* spare = strips + h * (kActivationColumns + kStrip<T>);
  const S* from = static_cast<const S*>(view.data) + item.head * view.head_step + item.first * view.inner_step;
  for (int64_t c = 0; c < item.count; c += kStrip<T>) {
    const int64_t width = item.count - c < kStrip<T> ? item.count - c : kStrip<T>;
    pack_strips(from + c * view.inner_step, view.inner_step, view.row_step, width, h, strips + c * h, h * kStrip<T>, 0);
    activate(strips + c * h, static_cast<const T*>(item.slope), h);
  }
  S* out = static_cast<S*>(item.out) + item.head * h * item.out_step + item.first;
  for_row_tiles(h, Rows<S, T>{item, strips, spare, out});
}

}  // namespace

void activation_item(const ActivationItem& item, bool is_double) {
  if (is_double) return act<double, double>(item);
  switch (item.Z->storage) {
    case Storage::BFloat16: return act<BFloat16, float>(item);
    case Storage::Half: return act<Half, float>(item);
    default: return act<float, float>(item);
  }
}

}  // namespace teleport_fast::TELEPORT_FAST_ISA
