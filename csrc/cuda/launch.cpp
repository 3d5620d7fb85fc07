// The CUDA kernels as torch ops, through the stable ABI: plans on the host, sends the tables, launches in torch's stream.
//
// Nothing waits for the device. The schemas are csrc/ops.cpp's; shapes and dtypes are checked in Python with the user's names,
// here again where a wrong one would be a memory error.
#include <algorithm>
#include <string>
#include <tuple>

#include "activation_action.h"
#include "covariance.h"
#include "diagonal_action.h"
#include "grad_norm_objective.h"
#include "gram_difference.h"
#include "group_action.h"
#include "host.h"
#include "launch_steps.h"
#include "matrix_exp.h"
#include "square_sums.h"

namespace teleport_fast {
namespace {

// D of a bucket's plus and minus views, and J: the Grams' difference and trace.
std::tuple<Tensor, Tensor> grams(const Call& call, const Tensors& plus, const Tensors& minus, int64_t joints) {
  const Tensor& like = plus.empty() ? minus[0] : plus[0];
  const int64_t heads = like.size(0), h = like.size(1), p = plus.size() / joints, m = minus.size() / joints;
  const bool float64 = is_double(like);
  std::vector<View> views;
  for (int64_t joint = 0; joint < joints; ++joint) {
    for (int64_t i = 0; i < p; ++i) views.push_back(call.view(plus[joint * p + i], heads, h, float64, joint));
    for (int64_t i = 0; i < m; ++i) views.push_back(call.view(minus[joint * m + i], heads, h, float64, joint));
  }
  GramPlan plan{};
  plan.joints = static_cast<int32_t>(joints), plan.heads = static_cast<int32_t>(heads), plan.h = static_cast<int32_t>(h);
  plan.plus = static_cast<int32_t>(p), plan.minus = static_cast<int32_t>(m), plan.float64 = float64;
  call.planned(tf_cuda_gram_difference_plan(views.data(), &plan, 2 * call.multiprocessors(), call.shared_limit()));
  const Tensor table = call.send(views), workspace = call.empty({plan.partials}, accumulator(float64));
  Tensor d = call.empty({joints * heads, h, h}, accumulator(float64)), trace = call.empty({joints * heads}, accumulator(float64));
  call.launched(tf_cuda_gram_difference(on_device<View>(table), &plan, workspace.data_ptr(), d.data_ptr(), trace.data_ptr(),
                                        call.stream));
  return {d, trace};
}

std::tuple<Tensor, Tensor> gram_difference(Tensors plus, Tensors minus, int64_t joints) {
  for (const Tensors* side : {&plus, &minus})
    if (!side->empty()) first_of("gram_difference", *side, joints);
  STD_TORCH_CHECK(!plus.empty() || !minus.empty(), "gram_difference: G_plus and G_minus are both empty");
  return grams(Call("gram_difference", plus.empty() ? minus[0] : plus[0]), plus, minus, joints);
}

Tensor grad_norm_objective(Tensors plus, Tensors minus, Tensor g, int64_t joints) {
  for (const Tensors* side : {&plus, &minus})
    if (!side->empty()) first_of("grad_norm_objective", *side, joints);
  STD_TORCH_CHECK(!plus.empty() || !minus.empty(), "grad_norm_objective: G_plus and G_minus are both empty");
  const Tensor& like = plus.empty() ? minus[0] : plus[0];
  const Call call("grad_norm_objective", like);
  const int64_t matrices = like.size(0) * joints, h = like.size(1);
  const bool float64 = is_double(like);
  STD_TORCH_CHECK(g.dim() == 4, "grad_norm_objective: g must be (candidates, ", matrices, ", ", h, ", ", h, ")");
  call.expect(g, {g.size(0), matrices, h, h}, accumulator(float64), "g");
  ObjectivePlan plan{g.size(0), matrices, h, float64, 0, 0, 0};
  call.planned(tf_cuda_grad_norm_objective_plan(&plan, call.shared_limit()));
  // -S₊ and S₋.
  const Tensor gram_plus = plus.empty() ? g : std::get<0>(grams(call, plus, {}, joints));
  const Tensor gram_minus = minus.empty() ? g : std::get<0>(grams(call, {}, minus, joints));
  Tensor objective = call.empty({g.size(0), matrices}, accumulator(float64));
  call.launched(tf_cuda_grad_norm_objective(&plan, g.data_ptr(), plus.empty() ? nullptr : gram_plus.data_ptr(),
                                            minus.empty() ? nullptr : gram_minus.data_ptr(), objective.data_ptr(), call.stream));
  return objective;
}

void covariance_(Tensor covariance, Tensors tensors, double decay, int64_t joints) {
  const Tensor& like = first_of("covariance_", tensors, joints);
  const Call call("covariance_", like);
  const int64_t heads = like.size(0), h = like.size(1), count = tensors.size();
  const bool float64 = is_double(like);
  call.expect(covariance, {joints * heads, h, h}, accumulator(float64), "C");
  std::vector<View> views;
  for (int64_t i = 0; i < count; ++i) views.push_back(call.view(tensors[i], heads, h, float64, i));
  GramPlan plan{};
  plan.joints = static_cast<int32_t>(count), plan.heads = static_cast<int32_t>(heads), plan.h = static_cast<int32_t>(h);
  plan.minus = 1, plan.float64 = float64;
  call.planned(tf_cuda_covariance_plan(views.data(), &plan, 2 * call.multiprocessors(), call.shared_limit()));
  const Tensor table = call.send(views), workspace = call.empty({plan.partials}, accumulator(float64));
  call.launched(tf_cuda_covariance_(on_device<View>(table), &plan, joints, decay, workspace.data_ptr(), covariance.data_ptr(),
                                    call.stream));
}

void group_action_(Tensors plus, Tensors minus, Tensor g, Tensor g_inverse_t, int64_t joints) {
  const Call call("group_action_", g);
  const bool float64 = is_double(g);
  STD_TORCH_CHECK(g.dim() == 3 && joints > 0 && g.size(0) % joints == 0, "group_action_: g must be (joints * heads, h, h)");
  const int64_t heads = g.size(0) / joints, h = g.size(1);
  std::vector<ActedView> views;
  for (const auto& [tensors, matrices] : {std::tie(plus, g), std::tie(minus, g_inverse_t)}) {
    call.expect(matrices, {joints * heads, h, h}, accumulator(float64), "g or g_inverse_t");
    if (!tensors.empty()) first_of("group_action_", tensors, joints);
    const int64_t run = tensors.size() / joints;
    for (int64_t i = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
      views.push_back({call.view(tensors[i], heads, h, float64, i / run), row_of(matrices, i / run, heads * h * h, float64 ? 8 : 4)});
    }
  }
  GroupActionPlan plan{};
  const int64_t count = views.size(), blocks = 4 * call.multiprocessors();
  call.planned(tf_cuda_group_action_plan(views.data(), count, blocks, nullptr, &plan));
  std::vector<int32_t> owners(plan.tiles);
  call.planned(tf_cuda_group_action_plan(views.data(), count, blocks, owners.data(), &plan));
  const Tensor table = call.send(views), tiles = call.send(owners);
  call.launched(tf_cuda_group_action_(on_device<ActedView>(table), on_device<int32_t>(tiles), &plan, call.stream));
}

std::tuple<Tensor, Tensor> square_sums(Tensors tensors, int64_t joints) {
  const Tensor& like = first_of("square_sums", tensors, joints);
  const Call call("square_sums", like);
  const int64_t heads = like.size(0), h = like.size(1), count = tensors.size();
  const bool float64 = is_double(like);
  std::vector<View> views;
  for (int64_t i = 0; i < count; ++i) views.push_back(call.view(tensors[i], heads, h, float64, i * joints / count));
  std::vector<JointRows> rows(joints);
  STD_TORCH_CHECK(heads * h <= INT32_MAX, "square_sums: heads * h is over 2^31 - 1");
  for (JointRows& one : rows) one.rows = static_cast<int32_t>(heads * h);
  SquareSumsPlan plan{};
  call.planned(tf_cuda_square_sums_plan(views.data(), count, rows.data(), joints, nullptr, &plan));
  std::vector<int32_t> owners(plan.tiles + plan.finish_blocks);
  call.planned(tf_cuda_square_sums_plan(views.data(), count, rows.data(), joints, owners.data(), &plan));
  const Tensor table = call.send(views), joint_table = call.send(rows), tiles = call.send(owners);
  const Tensor workspace = call.empty({2 * plan.partials}, accumulator(float64));
  Tensor squares = call.empty({joints * heads, h}, accumulator(float64)), l1 = call.empty({joints * heads, h}, accumulator(float64));
  call.launched(tf_cuda_square_sums(on_device<View>(table), on_device<JointRows>(joint_table), on_device<int32_t>(tiles), &plan,
                                    workspace.data_ptr(), squares.data_ptr(), l1.data_ptr(), float64, call.stream));
  return {squares, l1};
}

void diagonal_action_(Tensors tensors, Tensor factors, std::vector<int64_t> which, std::vector<double> shifts, int64_t joints) {
  const Tensor& like = first_of("diagonal_action_", tensors, joints);
  const Call call("diagonal_action_", like);
  const int64_t heads = like.size(0), h = like.size(1), count = tensors.size();
  const bool float64 = is_double(like);
  STD_TORCH_CHECK(which.size() == tensors.size() && shifts.size() == tensors.size() && factors.dim() == 3,
                  "diagonal_action_: which and shifts must be one per tensor, factors (kinds, joints * heads, h)");
  call.expect(factors, {factors.size(0), joints * heads, h}, accumulator(float64), "factors");
  std::vector<DiagonalView> views;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t joint = i * joints / count;
    views.push_back({call.view(tensors[i], heads, h, float64, joint), factors_of(factors, which[i], joint, heads, float64), 1.0, shifts[i]});
  }
  const int64_t tiles = tf_cuda_diagonal_action_plan(views.data(), count, nullptr);
  call.planned(tiles);
  std::vector<int32_t> owners(tiles);
  call.planned(tf_cuda_diagonal_action_plan(views.data(), count, owners.data()));
  const Tensor table = call.send(views), owner_table = call.send(owners);
  call.launched(tf_cuda_diagonal_action_(on_device<DiagonalView>(table), on_device<int32_t>(owner_table), tiles, float64, float64,
                                         call.stream));
}

void permutation_action_(Tensors tensors, Tensor index, int64_t joints) {
  const Tensor& like = first_of("permutation_action_", tensors, joints);
  const Call call("permutation_action_", like);
  const int64_t heads = like.size(0), h = like.size(1), count = tensors.size();
  call.expect(index, {joints * heads, h}, ScalarType::Long, "index");
  std::vector<PermutedView> views;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t joint = i * joints / count;
    views.push_back({call.view(tensors[i], heads, h, is_double(tensors[i]), joint),
                     static_cast<const int64_t*>(index.data_ptr()) + joint * heads * h});
  }
  int64_t shared = 0;
  const int64_t limit = call.shared_limit(), tiles = tf_cuda_permutation_action_plan(views.data(), count, limit, nullptr, &shared);
  call.planned(tiles);
  std::vector<int32_t> owners(tiles);
  call.planned(tf_cuda_permutation_action_plan(views.data(), count, limit, owners.data(), &shared));
  const Tensor table = call.send(views), owner_table = call.send(owners);
  call.launched(tf_cuda_permutation_action_(on_device<PermutedView>(table), on_device<int32_t>(owner_table), tiles, shared, call.stream));
}

void exponentials(const char* op, const Tensor& matrices, Tensor& plus, Tensor* minus) {
  const Call call(op, matrices);
  const ScalarType type = matrices.scalar_type();
  STD_TORCH_CHECK(matrices.dim() == 3 && (type == ScalarType::Float || type == ScalarType::Double), op,
                  ": M must be (batch, h, h), float32 or float64");
  const int64_t batch = matrices.size(0), h = matrices.size(1);
  call.expect(matrices, {batch, h, h}, type, "M");
  ExpPlan plan{batch, h, is_double(matrices), 0, 0, 0, 0, 0};
  call.planned(tf_cuda_matrix_exp_plan(&plan, call.shared_limit()));
  plus = call.empty({batch, h, h}, type);
  if (minus) *minus = call.empty({batch, h, h}, type);
  call.launched(tf_cuda_matrix_exp(&plan, matrices.data_ptr(), plus.data_ptr(), minus ? minus->data_ptr() : nullptr, call.stream));
}

Tensor matrix_exp(Tensor matrices) {
  Tensor plus;
  exponentials("matrix_exp", matrices, plus, nullptr);
  return plus;
}

std::tuple<Tensor, Tensor> matrix_exp_pair(Tensor matrices) {
  Tensor plus, minus;
  exponentials("matrix_exp_pair", matrices, plus, &minus);
  return {plus, minus};
}

Tensor act(const char* op, const Tensor& Z, const Tensor& matrix, const Tensor& slope, bool tangent) {
  const Call call(op, Z);
  STD_TORCH_CHECK(Z.dim() == 3, op, ": Z must be (batch, h, B)");
  const int64_t batch = Z.size(0), h = Z.size(1), columns = Z.size(2);
  const bool float64 = is_double(Z), shared = matrix.dim() == 3 && matrix.size(0) == 1;
  call.expect(matrix, {shared ? 1 : batch, h, h}, accumulator(float64), "the matrix");
  call.expect(slope, {h}, accumulator(float64), "the slopes");
  const View view = call.view(Z, batch, h, float64, 0);
  Tensor out = call.empty({batch, h, columns}, Z.scalar_type());
  if (batch * h * columns == 0) return out;
  call.launched(tf_cuda_activation_action(&view, matrix.data_ptr(), shared ? 0 : h * h, slope.data_ptr(), out.data_ptr(), tangent,
                                          call.stream));
  return out;
}

Tensor activation_action(Tensor Z, Tensor g, Tensor slope) { return act("activation_action", Z, g, slope, false); }

Tensor activation_action_tangent(Tensor Z, Tensor M, Tensor slope) { return act("activation_action_tangent", Z, M, slope, true); }

// The largest h that the op's kernel takes on the current device; -1: any.
int64_t widest(std::string op, bool float64) {
  int device = 0, shared = 0;
  succeed("widest", cudaGetDevice(&device));
  succeed("widest", cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const int64_t gram = tf_cuda_gram_difference_widest(float64, shared);
  if (op == "gram_difference" || op == "covariance_") return gram;
  if (op == "grad_norm_objective") return std::min(gram, tf_cuda_grad_norm_objective_widest(float64, shared));
  if (op == "matrix_exp" || op == "matrix_exp_pair") return tf_cuda_matrix_exp_widest(float64, shared);
  return op == "group_action_" ? tf_cuda_group_action_widest(float64) : -1;
}

}  // namespace
}  // namespace teleport_fast

// The tests register the same ops for CPU tensors, over an emulator.
#ifndef TELEPORT_FAST_EMULATED
#define TELEPORT_FAST_LIBRARY teleport_fast_cpp
#define TELEPORT_FAST_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(TELEPORT_FAST_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("widest", TORCH_BOX(&teleport_fast::widest));
}

STABLE_TORCH_LIBRARY_IMPL(TELEPORT_FAST_LIBRARY, TELEPORT_FAST_KEY, m) {
  m.impl("gram_difference", TORCH_BOX(&teleport_fast::gram_difference));
  m.impl("group_action_", TORCH_BOX(&teleport_fast::group_action_));
  m.impl("covariance_", TORCH_BOX(&teleport_fast::covariance_));
  m.impl("matrix_exp", TORCH_BOX(&teleport_fast::matrix_exp));
  m.impl("matrix_exp_pair", TORCH_BOX(&teleport_fast::matrix_exp_pair));
  m.impl("grad_norm_objective", TORCH_BOX(&teleport_fast::grad_norm_objective));
  m.impl("square_sums", TORCH_BOX(&teleport_fast::square_sums));
  m.impl("diagonal_action_", TORCH_BOX(&teleport_fast::diagonal_action_));
  m.impl("permutation_action_", TORCH_BOX(&teleport_fast::permutation_action_));
  m.impl("teleport_adamw_", TORCH_BOX(&teleport_fast::teleport_adamw_));
  m.impl("rotate_step_", TORCH_BOX(&teleport_fast::rotate_step_));
  m.impl("activation_action", TORCH_BOX(&teleport_fast::activation_action));
  m.impl("activation_action_tangent", TORCH_BOX(&teleport_fast::activation_action_tangent));
}
