// A diagonal move and an AdamW step in one pass over parameters, gradients and moments, one launch for a whole model.
//
// By rows, with f and 1/f given: p → (p + c) f − c, m → m / f, v → v / f², g = gradient / f, then AdamW on p, m, v with g.
// Moves the minimum: p, g, m, v once in and p, m, v once out (28 bytes an entry in float32, 14 in bf16); two factors per
// row and tile and a descriptor of 240 bytes per warp add under 1% (the tests allow 5%). Moving all four and stepping
// apart takes 60 and 30.
// Launch: one block of 256 threads per tile, as in diagonal_action: 8 rows × 2,048 columns where columns are neighbours in
// memory, else 32 lanes × one pack of rows × 512 columns. Packs of 16 bytes where all four tensors have one layout.
// Loses to plain torch for one small tensor, and where a gradient is laid out across its parameter: those reads do not
// coalesce (make it contiguous first).
#include "teleport_adamw.h"

#include <cmath>

#include "device.h"

namespace teleport_fast {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumnsFastChunk = 2048;
constexpr int kRowsFastChunk = 512;
constexpr int kInFlight = 2;  // packs of each of the four tensors that a thread has under way

template <class Acc>
struct Numbers {
  Acc beta1, beta2, one_minus_beta1, one_minus_beta2, eps, keep, rate, scale;
};

template <class Acc>
struct RowFactors {
  Acc parameter, gradient;
};

// AdamW on one entry whose row moves by f.
template <class Acc, class S>
__device__ __forceinline__ void step_entry(S& p, S g_stored, S& m, S& v, RowFactors<Acc> f, Acc shift,
                                           const Numbers<Acc>& n) {
  const Acc g = widen(g_stored) * f.gradient;
  // (p + c) f − c as p f + c (f − 1): small p are not lost in the sum.
  const Acc moved = (widen(p) * f.parameter + shift * (f.parameter - 1)) * n.keep;
  const Acc first = n.one_minus_beta1 * g + widen(m) * (f.gradient * n.beta1);
  const Acc second = n.one_minus_beta2 * g * g + widen(v) * (f.gradient * f.gradient * n.beta2);
  p = narrow<S>(moved - n.rate * first / (sqrt(second) * n.scale + n.eps));
  m = narrow<S>(first);
  v = narrow<S>(second);
}

// The four tensors' entries of one head, at any strides.
template <class S>
struct Operands {
  S* at[4];

  __device__ __forceinline__ Operands(const AdamwView& d, int head) {
    at[0] = static_cast<S*>(d.view.data) + head * d.view.head_stride;
    TF_UNROLL
    for (int t = 0; t < 3; ++t) at[t + 1] = static_cast<S*>(d.others[t]) + head * d.strides[t][0];
  }
};

template <class Acc, class S>
__device__ __forceinline__ void step_single(const AdamwView& d, const Operands<S>& x, const Columns& columns, int64_t row,
                                            uint32_t k, RowFactors<Acc> f, const Numbers<Acc>& n) {
  const uint32_t at = columns.first_inner + k, outer = columns.flat ? 0 : at / columns.inner;
  const int64_t o = columns.first_outer + outer, i = at - outer * columns.inner;
  S* place[4];
  place[0] = x.at[0] + row * d.view.row_stride + o * d.view.outer_stride + i * d.view.inner_stride;
  TF_UNROLL
  for (int t = 0; t < 3; ++t) place[t + 1] = x.at[t + 1] + row * d.strides[t][1] + o * d.strides[t][2] + i * d.strides[t][3];
  S p = gload(place[0]), g = gload(place[1]), m = gload(place[2]), v = gload(place[3]);
  step_entry<Acc, S>(p, g, m, v, f, static_cast<Acc>(d.shift), n);
  gstore(place[0], p);
  gstore(place[2], m);
  gstore(place[3], v);
}

// One pack of each tensor.
template <class S>
struct Packs {
  static constexpr int kPack = 16 / sizeof(S);
  using P = Pack<S, kPack>;
  P p, g, m, v;

  __device__ __forceinline__ void load(const Operands<S>& x, int64_t offset) {
    p = gload(reinterpret_cast<const P*>(x.at[0] + offset));
    g = gload(reinterpret_cast<const P*>(x.at[1] + offset));
    m = gload(reinterpret_cast<const P*>(x.at[2] + offset));
    v = gload(reinterpret_cast<const P*>(x.at[3] + offset));
  }
  __device__ __forceinline__ void store(const Operands<S>& x, int64_t offset) const {
    gstore(reinterpret_cast<P*>(x.at[0] + offset), p);
    gstore(reinterpret_cast<P*>(x.at[2] + offset), m);
    gstore(reinterpret_cast<P*>(x.at[3] + offset), v);
  }
};

template <class Acc, class S>
__device__ __forceinline__ void step_row(const AdamwView& d, const Operands<S>& x, const Columns& columns, int row,
                                         int count, RowFactors<Acc> f, const Numbers<Acc>& n) {
  constexpr int kPack = 16 / sizeof(S);
  const int lane = threadIdx.x % 32;
  if (!d.view.vector) {
    TF_NO_UNROLL
    for (int k = lane; k < count; k += 32) step_single<Acc, S>(d, x, columns, row, k, f, n);
    return;
  }
  const int64_t start = row * d.view.row_stride;
  TF_NO_UNROLL
  for (int k = lane * kPack; k < count; k += 32 * kPack * kInFlight) {
    Packs<S> packs[kInFlight];
    TF_UNROLL
    for (int u = 0; u < kInFlight; ++u) {
      const int at = k + u * 32 * kPack;
      if (at < count) packs[u].load(x, start + columns.offset(at));
    }
    TF_UNROLL
    for (int u = 0; u < kInFlight; ++u) {
      const int at = k + u * 32 * kPack;
      if (at >= count) break;
      Packs<S>& one = packs[u];
      TF_UNROLL
      for (int j = 0; j < kPack; ++j) {
        step_entry<Acc, S>(one.p.v[j], one.g.v[j], one.m.v[j], one.v.v[j], f, static_cast<Acc>(d.shift), n);
      }
      one.store(x, start + columns.offset(at));
    }
  }
}

template <class Acc>
__device__ __forceinline__ RowFactors<Acc> factors_of(const AdamwView& d, int64_t row) {
  return {gload(static_cast<const Acc*>(d.parameter_factors) + row), gload(static_cast<const Acc*>(d.gradient_factors) + row)};
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, 2)
    teleport_adamw_kernel(const AdamwView* views, const int32_t* owners, Numbers<Acc> n) {
  SHARED_ARRAY(Shared<Acc>, factors, [2][32 * (sizeof(Acc) == 8 ? 2 : 8)]);
  const AdamwView d = gload(views + gload(owners + blockIdx.x));
  const View& view = d.view;
  int tile = static_cast<int>(blockIdx.x) - view.first_tile;
  const int split = tile % view.splits;
  tile /= view.splits;
  const int row_block = tile % view.row_blocks, head = tile / view.row_blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunk = view.rows_fast ? kRowsFastChunk : kColumnsFastChunk;
  const int64_t first = static_cast<int64_t>(split) * chunk;
  const int64_t left = static_cast<int64_t>(view.outer) * view.inner - first;
  const int count = static_cast<int>(left < chunk ? left : chunk);
  const int64_t head_row = static_cast<int64_t>(head) * view.rows;

  with_storage<Acc>(view.storage, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = 16 / sizeof(S);
    const Operands<S> x(d, head);
    const Columns columns(view, first);
    if (!view.rows_fast) {
      const int row = row_block * kWarps + warp;
      if (row < view.rows) step_row<Acc, S>(d, x, columns, row, count, factors_of<Acc>(d, head_row + row), n);
      return;
    }
    const int first_row = row_block * 32 * kPack;
    for (int r = threadIdx.x; r < 32 * kPack && first_row + r < view.rows; r += kThreads) {
      const RowFactors<Acc> f = factors_of<Acc>(d, head_row + first_row + r);
      factors[0][r] = f.parameter;
      factors[1][r] = f.gradient;
    }
    __syncthreads();
    // Neighbouring lanes take neighbouring packs where a pack fits, else neighbouring rows.
    const int at_lane = view.vector ? lane * kPack : lane, row = first_row + at_lane, step = view.vector ? 1 : 32;
    TF_NO_UNROLL
    for (int k = warp; k < count; k += kWarps) {
      if (view.vector) {
        if (row >= view.rows) continue;
        const int64_t offset = columns.offset(k) + row * view.row_stride;
        Packs<S> one;
        one.load(x, offset);
        TF_UNROLL
        for (int j = 0; j < kPack; ++j) {
          const RowFactors<Acc> f{factors[0][at_lane + j], factors[1][at_lane + j]};
          step_entry<Acc, S>(one.p.v[j], one.g.v[j], one.m.v[j], one.v.v[j], f, static_cast<Acc>(d.shift), n);
        }
        one.store(x, offset);
      } else {
        TF_NO_UNROLL
        for (int j = 0; j < kPack && row + step * j < view.rows; ++j) {
          const RowFactors<Acc> f{factors[0][at_lane + step * j], factors[1][at_lane + step * j]};
          step_single<Acc, S>(d, x, columns, row + step * j, k, f, n);
        }
      }
    }
  });
}

bool plan_one(AdamwView& d) {
  View& view = d.view;
  const int64_t own[4] = {view.head_stride, view.row_stride, view.outer_stride, view.inner_stride};
  d.alike = 1;
  for (int i = 0; i < 12; ++i) d.alike = d.alike && d.strides[i / 4][i % 4] == own[i % 4];
  if (!d.alike) {
    // Each tensor keeps its own axes: joining them in one would part it from the others.
    View copy = view;
    if (!prepare(copy, false)) return false;
    view.rows_fast = copy.rows_fast;
    view.vector = 0;
    return true;
  }
  if (!prepare(view, true)) return false;
  const int64_t joined[4] = {view.head_stride, view.row_stride, view.outer_stride, view.inner_stride};
  for (int i = 0; i < 12; ++i) d.strides[i / 4][i % 4] = joined[i % 4];
  for (void* other : d.others) view.vector = view.vector && reinterpret_cast<uintptr_t>(other) % 16 == 0;
  return true;
}

template <class Acc>
cudaError_t run(const AdamwView* views, const int32_t* owners, int64_t tiles, const AdamwStep& s, cudaStream_t stream) {
  const Numbers<Acc> numbers{static_cast<Acc>(s.beta1),
                             static_cast<Acc>(s.beta2),
                             static_cast<Acc>(1 - s.beta1),
                             static_cast<Acc>(1 - s.beta2),
                             static_cast<Acc>(s.eps),
                             static_cast<Acc>(1 - s.lr * s.weight_decay),
                             static_cast<Acc>(s.lr / (1 - std::pow(s.beta1, s.step))),
                             static_cast<Acc>(1 / std::sqrt(1 - std::pow(s.beta2, s.step)))};
  return TF_LAUNCH(teleport_adamw_kernel<Acc>, static_cast<unsigned>(tiles), kThreads, 0, stream, views, owners, numbers);
}

}  // namespace teleport_fast

using namespace teleport_fast;

int64_t tf_cuda_teleport_adamw_plan(AdamwView* views, int64_t count, int32_t* owners) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    View& view = views[i].view;
    if ((view.storage == kFloat64) != (views[0].view.storage == kFloat64) || !plan_one(views[i])) return -1;
    const int64_t row_tile = view.rows_fast ? 32 * (16 / storage_bytes(view.storage)) : kWarps;
    const int64_t splits = ceil_div(columns_of(view), view.rows_fast ? kRowsFastChunk : kColumnsFastChunk);
    if (splits > INT32_MAX) return -1;
    view.splits = static_cast<int32_t>(splits);
    view.row_blocks = static_cast<int32_t>(ceil_div(view.rows, row_tile));
    view.first_tile = static_cast<int32_t>(tiles);
    const int64_t here = int64_t{view.heads} * view.row_blocks * splits;
    if (tiles + here > INT32_MAX) return -1;
    for (int64_t t = 0; owners && t < here; ++t) owners[tiles + t] = static_cast<int32_t>(i);
    tiles += here;
  }
  return tiles;
}

cudaError_t tf_cuda_teleport_adamw_(const AdamwView* views, const int32_t* owners, int64_t tiles, const AdamwStep* step,
                                    int float64, cudaStream_t stream) {
  if (tiles == 0) return cudaSuccess;
  return float64 ? run<double>(views, owners, tiles, *step, stream) : run<float>(views, owners, tiles, *step, stream);
}
