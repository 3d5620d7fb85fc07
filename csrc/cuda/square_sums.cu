// Row square sums and row l1 sums of many strided views, in one launch and a small second one.
//
// Computes, for every row of every joint, the sums of x² and |x| over the columns of all of the joint's views.
// Moves each input once; partial sums are 8 bytes per row and 2,048 columns (0.1% in float32, 0.2% in bf16).
// Launch: one block of 256 threads per tile. Columns fast in memory: 8 rows × 2,048 columns, a warp to a row. Rows fast:
// 32 lanes × one pack of rows (128 in float32) × 512 columns, a warp to every eighth column. A second launch adds the
// partial sums in a fixed order; it is left out where every row has one.
// Loses to plain torch for one small contiguous tensor, where a launch costs more than the sums.
#include "square_sums.h"

#include "device.h"

namespace teleport_fast {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumnsFastChunk = 2048;
constexpr int kRowsFastChunk = 512;
constexpr int kInFlight = 4;  // loads that a thread has under way before it uses the first

template <class Acc, class S>
__device__ void sum_row(const View& view, const S* row, int64_t first, int count, Acc& square, Acc& l1) {
  constexpr int kPack = 16 / sizeof(S);
  const int lane = threadIdx.x % 32;
  const Columns columns(view, first);
  if (view.vector) {
    for (int k = lane * kPack; k < count; k += 32 * kPack * kInFlight) {
      Pack<S, kPack> x[kInFlight] = {};
      TF_UNROLL
      for (int u = 0; u < kInFlight; ++u) {
        const int at = k + u * 32 * kPack;
        if (at < count) x[u] = gload(reinterpret_cast<const Pack<S, kPack>*>(row + columns.offset(at)));
      }
      TF_UNROLL
      for (int u = 0; u < kInFlight; ++u) {
        if (k + u * 32 * kPack >= count) break;
        TF_UNROLL
        for (int j = 0; j < kPack; ++j) {
          const Acc value = widen(x[u].v[j]);
          square += value * value;
          l1 += fabs(value);
        }
      }
    }
  } else {
    for (int k = lane; k < count; k += 32) {
      const Acc value = widen(gload(row + columns.offset(k)));
      square += value * value;
      l1 += fabs(value);
    }
  }
}

// One column's share of the lane's kPack rows: neighbours where a pack fits, else 32 apart so that lanes are neighbours.
template <class S, int kPack>
__device__ __forceinline__ Pack<S, kPack> load_rows(const View& view, const S* column, int row, int rows_left) {
  Pack<S, kPack> x = {};
  if (view.vector) {
    if (row < rows_left) x = gload(reinterpret_cast<const Pack<S, kPack>*>(column + row));
  } else {
    TF_UNROLL
    for (int j = 0; j < kPack; ++j) {
      if (row + 32 * j < rows_left) x.v[j] = gload(column + (row + 32 * j) * view.row_stride);
    }
  }
  return x;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    square_sums_kernel(const View* views, const JointRows* joints, const int32_t* owners, Acc* squares, Acc* l1s) {
  constexpr int kMostRows = 32 * (sizeof(Acc) == 8 ? 2 : 8);
  SHARED_ARRAY(Shared<Acc>, sums, [2][kWarps][kMostRows]);
  const View view = gload(views + gload(owners + blockIdx.x));
  const JointRows joint = gload(joints + view.joint);
  int tile = static_cast<int>(blockIdx.x) - view.first_tile;
  const int split = tile % view.splits;
  tile /= view.splits;
  const int row_block = tile % view.row_blocks, head = tile / view.row_blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunk = view.rows_fast ? kRowsFastChunk : kColumnsFastChunk;
  const int64_t first = static_cast<int64_t>(split) * chunk;
  const int64_t left = static_cast<int64_t>(view.outer) * view.inner - first;
  const int count = static_cast<int>(left < chunk ? left : chunk);
  const int64_t out = joint.partial + static_cast<int64_t>(view.slot + split) * joint.rows + head * view.rows;

  with_storage<Acc>(view.storage, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = 16 / sizeof(S);
    const S* data = static_cast<const S*>(view.data) + head * view.head_stride;
    if (!view.rows_fast) {
      const int row = row_block * kWarps + warp;
      Acc square = 0, l1 = 0;
      if (row < view.rows) sum_row<Acc>(view, data + row * view.row_stride, first, count, square, l1);
      square = warp_sum(square);
      l1 = warp_sum(l1);
      if (lane == 0 && row < view.rows) {
        gstore(squares + out + row, square);
        gstore(l1s + out + row, l1);
      }
      return;
    }
    const int first_row = row_block * 32 * kPack;
    const int rows_left = view.rows - first_row;
    const int row = view.vector ? lane * kPack : lane;
    data += first_row * view.row_stride;
    const Columns columns(view, first);
    Acc square[kPack] = {}, l1[kPack] = {};
    for (int k = warp; k < count; k += kWarps * kInFlight) {
      Pack<S, kPack> x[kInFlight] = {};
      TF_UNROLL
      for (int u = 0; u < kInFlight; ++u) {
        const int at = k + u * kWarps;
        if (at < count) x[u] = load_rows<S, kPack>(view, data + columns.offset(at), row, rows_left);
      }
      TF_UNROLL
      for (int u = 0; u < kInFlight; ++u) {
        if (k + u * kWarps >= count) break;
        TF_UNROLL
        for (int j = 0; j < kPack; ++j) {
          const Acc value = widen(x[u].v[j]);
          square[j] += value * value;
          l1[j] += fabs(value);
        }
      }
    }
    TF_UNROLL
    for (int j = 0; j < kPack; ++j) {
      const int at = view.vector ? row + j : row + 32 * j;
      sums[0][warp][at] = square[j];
      sums[1][warp][at] = l1[j];
    }
    __syncthreads();
    for (int r = threadIdx.x; r < 32 * kPack && r < rows_left; r += kThreads) {
      Acc square_sum = 0, l1_sum = 0;
      for (int w = 0; w < kWarps; ++w) {
        square_sum += sums[0][w][r];
        l1_sum += sums[1][w][r];
      }
      gstore(squares + out + first_row + r, square_sum);
      gstore(l1s + out + first_row + r, l1_sum);
    }
  });
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    square_sums_finish_kernel(const JointRows* joints, const int32_t* owners, const Acc* partial_squares,
                              const Acc* partial_l1s, Acc* squares, Acc* l1s) {
  const JointRows joint = gload(joints + gload(owners + blockIdx.x));
  const int row = (static_cast<int>(blockIdx.x) - joint.first_block) * kThreads + threadIdx.x;
  if (row >= joint.rows) return;
  Acc square = 0, l1 = 0;
  for (int slot = 0; slot < joint.slots; ++slot) {
    const int64_t at = joint.partial + static_cast<int64_t>(slot) * joint.rows + row;
    square += gload(partial_squares + at);
    l1 += gload(partial_l1s + at);
  }
  gstore(squares + joint.out + row, square);
  gstore(l1s + joint.out + row, l1);
}

template <class Acc>
cudaError_t run(const View* views, const JointRows* joints, const int32_t* owners, const SquareSumsPlan& plan,
                Acc* workspace, Acc* squares, Acc* l1s, cudaStream_t stream) {
  const bool direct = plan.finish_blocks == 0;
  if (plan.tiles > 0) {
    cudaError_t error = TF_LAUNCH(square_sums_kernel<Acc>, static_cast<unsigned>(plan.tiles), kThreads, 0, stream, views,
                                  joints, owners, direct ? squares : workspace, direct ? l1s : workspace + plan.partials);
    if (error != cudaSuccess) return error;
  }
  if (direct) return cudaSuccess;
  return TF_LAUNCH(square_sums_finish_kernel<Acc>, static_cast<unsigned>(plan.finish_blocks), kThreads, 0, stream, joints,
                   owners + plan.tiles, static_cast<const Acc*>(workspace),
                   static_cast<const Acc*>(workspace + plan.partials), squares, l1s);
}

}  // namespace teleport_fast

using namespace teleport_fast;

int tf_cuda_square_sums_plan(View* views, int64_t view_count, JointRows* joints, int64_t joint_count, int32_t* owners,
                             SquareSumsPlan* plan) {
  for (int64_t j = 0; j < joint_count; ++j) joints[j].slots = 0;
  int64_t tiles = 0;
  for (int64_t i = 0; i < view_count; ++i) {
    View& view = views[i];
    if (view.joint < 0 || view.joint >= joint_count) return -1;
    JointRows& joint = joints[view.joint];
    if (int64_t{view.heads} * view.rows != joint.rows || !prepare(view, true)) return -1;
    const int64_t row_tile = view.rows_fast ? 32 * (16 / storage_bytes(view.storage)) : kWarps;
    const int64_t splits = ceil_div(columns_of(view), view.rows_fast ? kRowsFastChunk : kColumnsFastChunk);
    view.splits = static_cast<int32_t>(splits > 0 ? splits : 1);  // a view without columns still writes its zeros
    view.row_blocks = static_cast<int32_t>(ceil_div(view.rows, row_tile));
    view.slot = joint.slots;
    view.first_tile = static_cast<int32_t>(tiles);
    joint.slots += view.splits;
    const int64_t count = int64_t{view.heads} * view.row_blocks * view.splits;
    if (splits > INT32_MAX || tiles + count > INT32_MAX) return -1;
    for (int64_t t = 0; owners && t < count; ++t) owners[tiles + t] = static_cast<int32_t>(i);
    tiles += count;
  }
  int64_t out = 0, partial = 0, finish = 0;
  bool direct = true;
  for (int64_t j = 0; j < joint_count; ++j) {
    joints[j].out = out;
    joints[j].partial = partial;
    joints[j].first_block = static_cast<int32_t>(finish);
    const int64_t count = ceil_div(joints[j].rows, kThreads);
    for (int64_t t = 0; owners && t < count; ++t) owners[tiles + finish + t] = static_cast<int32_t>(j);
    out += joints[j].rows;
    partial += int64_t{joints[j].slots} * joints[j].rows;
    finish += count;
    direct = direct && joints[j].slots == 1;
  }
  *plan = {tiles, direct ? 0 : finish, partial};
  return 0;
}

cudaError_t tf_cuda_square_sums(const View* views, const JointRows* joints, const int32_t* owners,
                                const SquareSumsPlan* plan, void* workspace, void* squares, void* l1, int accumulate64,
                                cudaStream_t stream) {
  if (accumulate64) {
    return run(views, joints, owners, *plan, static_cast<double*>(workspace), static_cast<double*>(squares),
               static_cast<double*>(l1), stream);
  }
  return run(views, joints, owners, *plan, static_cast<float*>(workspace), static_cast<float*>(squares),
             static_cast<float*>(l1), stream);
}
