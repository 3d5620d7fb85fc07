// launch.cpp's optimizer steps: teleport_adamw_, rotate_step_ and the BLAS's part in it.
#pragma once
#include "host.h"
#include "rotate_step.h"
#include "teleport_adamw.h"

namespace teleport_fast {

inline void teleport_adamw_(Tensors parameters, Tensors gradients, Tensors first_moments, Tensors second_moments, Tensor factors,
                     std::vector<int64_t> which, std::vector<double> shifts, double step, double lr, double beta1, double beta2,
                     double eps, double weight_decay, int64_t joints) {
  const Tensor& like = first_of("teleport_adamw_", parameters, joints);
  const Call call("teleport_adamw_", like);
  const int64_t heads = like.size(0), h = like.size(1), count = parameters.size();
  const bool float64 = is_double(like);
  const Tensors* others[] = {&gradients, &first_moments, &second_moments};
  for (const Tensors* list : others) STD_TORCH_CHECK(list->size() == parameters.size(), "teleport_adamw_: the lists must be of one length");
  STD_TORCH_CHECK(which.size() == 2 * parameters.size() && shifts.size() == parameters.size() && factors.dim() == 3,
                  "teleport_adamw_: which must be two per parameter, shifts one, factors (kinds, joints * heads, h)");
  call.expect(factors, {factors.size(0), joints * heads, h}, accumulator(float64), "factors");
  std::vector<AdamwView> views(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t joint = i * joints / count;
    AdamwView& one = views[i];
    one.view = call.view(parameters[i], heads, h, float64, joint);
    for (int t = 0; t < 3; ++t) {
      const View other = call.view((*others[t])[i], heads, h, float64, joint);
      STD_TORCH_CHECK(other.outer == one.view.outer && other.inner == one.view.inner && other.storage == one.view.storage,
                      "teleport_adamw_: an entry's four views must have one shape and dtype");
      one.others[t] = other.data;
      const int64_t strides[] = {other.head_stride, other.row_stride, other.outer_stride, other.inner_stride};
      for (int s = 0; s < 4; ++s) one.strides[t][s] = strides[s];
    }
    one.parameter_factors = factors_of(factors, which[i], joint, heads, float64);
    one.gradient_factors = factors_of(factors, which[count + i], joint, heads, float64);
    one.shift = shifts[i];
  }
  const int64_t tiles = tf_cuda_teleport_adamw_plan(views.data(), count, nullptr);
  call.planned(tiles);
  std::vector<int32_t> owners(tiles);
  call.planned(tf_cuda_teleport_adamw_plan(views.data(), count, owners.data()));
  const Tensor table = call.send(views), owner_table = call.send(owners);
  const AdamwStep numbers{step, lr, beta1, beta2, eps, weight_decay};
  call.launched(tf_cuda_teleport_adamw_(on_device<AdamwView>(table), on_device<int32_t>(owner_table), tiles, &numbers, float64, call.stream));
}

// One launch of a step's part on tensors of one shape; bases of the sides that the caller turns are left out.
inline RotatePlan rotate(const Call& call, const Tensors& parameters, const Tensors& gradients, const Tensors& first_moments,
                  const Tensors& second_moments, const Tensors& left, const Tensors& right, int64_t base, RotatePart part,
                  const RotateStep& step) {
  const Tensor& like = parameters[0];
  const int64_t heads = like.size(0), h = like.size(1), count = parameters.size();
  const bool float64 = is_double(like);
  std::vector<RotateView> views(count);
  for (int64_t i = 0; i < count; ++i) {
    const Tensor* tensors[] = {&parameters[i], &gradients[i], &first_moments[i], &second_moments[i]};
    for (int t = 0; t < 4; ++t) views[i].views[t] = call.view(*tensors[t], heads, h, float64, i);
    views[i].bases[0] = left.empty() ? nullptr : left[i].data_ptr();
    views[i].bases[1] = right.empty() ? nullptr : right[i].data_ptr();
  }
  RotatePlan plan{};
  plan.left = !left.empty(), plan.right = !right.empty(), plan.base = static_cast<int32_t>(base);
  plan.part = part, plan.float64 = float64;
  call.planned(tf_cuda_rotate_step_plan(views.data(), count, 4 * call.multiprocessors(), call.shared_limit(), &plan));
  if (plan.fused_left != plan.left || plan.fused_right != plan.right) return plan;
  const Tensor table = call.send(views), workspace = call.empty({plan.workspace}, accumulator(float64));
  call.launched(tf_cuda_rotate_step_(on_device<RotateView>(table), count, &plan, &step, workspace.data_ptr(), call.stream));
  return plan;
}

inline void rotate_step_(Tensors parameters, Tensors gradients, Tensors first_moments, Tensors second_moments, Tensors left, Tensors right,
                  int64_t base, double step, double lr, double beta1, double beta2, double eps, double weight_decay, bool nesterov) {
  if (parameters.empty()) return;
  const Tensor& like = first_of("rotate_step_", parameters, 1);
  const Call call("rotate_step_", like);
  const ScalarType type = accumulator(is_double(like));
  const int64_t heads = like.size(0), h = like.size(1), n = like.dim() == 3 ? like.size(2) : like.size(2) * like.size(3);
  if (base != kAdam) second_moments = first_moments;
  for (const Tensors* list : {&gradients, &first_moments, &second_moments})
    STD_TORCH_CHECK(list->size() == parameters.size(), "rotate_step_: the lists must be of one length");
  for (const Tensors* bases : {&left, &right})
    STD_TORCH_CHECK(bases->empty() || bases->size() == parameters.size(), "rotate_step_: bases must be one per parameter, or none");
  for (const Tensor& one : left) call.expect(one, {heads, h, h}, type, "left");
  for (const Tensor& one : right) call.expect(one, {n, n}, type, "right");
  const RotateStep numbers{step, lr, beta1, beta2, eps, weight_decay, nesterov ? 1.0 : 0.0};
  const RotatePlan plan =
      rotate(call, parameters, gradients, first_moments, second_moments, left, right, base, kWholeStep, numbers);
  const bool apart_left = plan.left && !plan.fused_left, apart_right = plan.right && !plan.fused_right;
  if (!apart_left && !apart_right) return;
  // Wide sides: the BLAS turns, the kernel does the part in the turned basis, the BLAS turns back, the kernel updates.
  using torch::stable::matmul, torch::stable::transpose;
  Tensors turned;
  for (size_t i = 0; i < parameters.size(); ++i) {
    Tensor x = torch::stable::to(torch::stable::flatten(gradients[i], 2, -1), type);
    if (apart_left) x = matmul(left[i], x);
    if (apart_right) x = matmul(x, transpose(right[i], 0, 1));
    turned.push_back(torch::stable::contiguous(x));
  }
  const RotatePlan inner = rotate(call, turned, turned, first_moments, second_moments, apart_left ? Tensors{} : left,
                                  apart_right ? Tensors{} : right, base, kTurnedPart, numbers);
  STD_TORCH_CHECK(inner.fused_left == inner.left && inner.fused_right == inner.right, "rotate_step_: a turn was left out");
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (apart_right) turned[i] = matmul(turned[i], right[i]);
    if (apart_left) turned[i] = matmul(transpose(left[i], 1, 2), turned[i]);
  }
  rotate(call, parameters, turned, turned, turned, {}, {}, base, kUpdate, numbers);
}

}  // namespace teleport_fast
