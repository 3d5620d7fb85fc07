"""Who computes: one file per op, each with its formula in plain torch beside the choice of a faster backend."""

from teleport_fast.ops.activation_action import activation_action, activation_action_tangent
from teleport_fast.ops.covariance import covariance_
from teleport_fast.ops.data_dependent_steps import data_dependent_steps_
from teleport_fast.ops.diagonal_action import diagonal_action_
from teleport_fast.ops.grad_norm_objective import grad_norm_objective
from teleport_fast.ops.gram_difference import gram_difference
from teleport_fast.ops.group_action import group_action, group_action_
from teleport_fast.ops.matrix_exp import matrix_exp, matrix_exp_pair
from teleport_fast.ops.orthogonal_iteration import orthogonal_iteration_
from teleport_fast.ops.permutation_action import permutation_action_
from teleport_fast.ops.rotate_step import rotate_step_
from teleport_fast.ops.square_sums import square_sums
from teleport_fast.ops.teleport_adamw import teleport_adamw_

__all__ = [
    "activation_action",
    "activation_action_tangent",
    "covariance_",
    "data_dependent_steps_",
    "diagonal_action_",
    "grad_norm_objective",
    "gram_difference",
    "group_action",
    "group_action_",
    "matrix_exp",
    "matrix_exp_pair",
    "orthogonal_iteration_",
    "permutation_action_",
    "rotate_step_",
    "square_sums",
    "teleport_adamw_",
]
