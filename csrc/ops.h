// The raw ops of namespace teleport_fast_cpp, one per file of csrc/cpu.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace teleport_fast {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> gram_difference(
    std::vector<torch::stable::Tensor> plus, std::vector<torch::stable::Tensor> minus, int64_t joints);

void group_action_(
    std::vector<torch::stable::Tensor> plus, std::vector<torch::stable::Tensor> minus, torch::stable::Tensor g,
    torch::stable::Tensor g_inverse_t, int64_t joints);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> square_sums(std::vector<torch::stable::Tensor> tensors, int64_t joints);

void diagonal_action_(
    std::vector<torch::stable::Tensor> tensors, torch::stable::Tensor factors, std::vector<int64_t> which, std::vector<double> shifts,
    int64_t joints);

void permutation_action_(std::vector<torch::stable::Tensor> tensors, torch::stable::Tensor index, int64_t joints);

void teleport_adamw_(
    std::vector<torch::stable::Tensor> parameters, std::vector<torch::stable::Tensor> gradients,
    std::vector<torch::stable::Tensor> first_moments, std::vector<torch::stable::Tensor> second_moments, torch::stable::Tensor factors,
    std::vector<int64_t> which, std::vector<double> shifts, double step, double lr, double beta1, double beta2, double eps,
    double weight_decay, int64_t joints);

void rotate_step_(
    std::vector<torch::stable::Tensor> parameters, std::vector<torch::stable::Tensor> gradients,
    std::vector<torch::stable::Tensor> first_moments, std::vector<torch::stable::Tensor> second_moments,
    std::vector<torch::stable::Tensor> left, std::vector<torch::stable::Tensor> right, int64_t base, double step, double lr, double beta1,
    double beta2, double eps, double weight_decay, bool nesterov);

void covariance_(
    torch::stable::Tensor covariance, std::vector<torch::stable::Tensor> tensors, double decay, int64_t joints);

void orthogonal_iteration_(
    std::vector<torch::stable::Tensor> bases, std::vector<torch::stable::Tensor> covariances, torch::stable::Tensor turns);

torch::stable::Tensor matrix_exp(torch::stable::Tensor matrices);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> matrix_exp_pair(torch::stable::Tensor matrices);

torch::stable::Tensor activation_action(torch::stable::Tensor Z, torch::stable::Tensor g, torch::stable::Tensor slope);

torch::stable::Tensor activation_action_tangent(torch::stable::Tensor Z, torch::stable::Tensor M, torch::stable::Tensor slope);

torch::stable::Tensor grad_norm_objective(
    std::vector<torch::stable::Tensor> plus, std::vector<torch::stable::Tensor> minus, torch::stable::Tensor g, int64_t joints);

void data_dependent_steps_(
    torch::stable::Tensor Z0, std::vector<torch::stable::Tensor> tail, torch::stable::Tensor gram, torch::stable::Tensor target,
    torch::stable::Tensor lead, std::vector<torch::stable::Tensor> Ts, torch::stable::Tensor outputs, torch::stable::Tensor trace,
    double slope, double scale, double cap, double gram_limit, double square_limit);

}  // namespace teleport_fast
