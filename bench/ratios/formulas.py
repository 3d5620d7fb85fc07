"""Floating-point operations of one call of an op, by formula; a multiplication with its addition counts as two.

What symmetric products need is counted, a triangle, not what a BLAS would do. Bytes are those of bench/gpu/problems.py: each input
read once, each output written once.
"""

from __future__ import annotations

from collections.abc import Callable

# Products of the polynomials of csrc/cpu/matrix_exp_kernel.cpp at the norm of EXPONENT: float32, float64.
EXPONENT = 0.9
ONE, PAIR = (5, 5), (6, 7)
# Bias corrections, root, quotient and update of Adam's step; with the powers of s that move four tensors.
ADAM, MOVED_ADAM = 13, 17

Formula = Callable[[int, int, int, bool], float]


def triangles(heads: int, h: int, n: int) -> float:
    """G Gᵀ of two gradients (heads, h, n)."""
    return 2.0 * heads * h * (h + 1) * n


FLOPS: dict[str, Formula] = {
    "gram_difference": lambda heads, h, n, double: triangles(heads, h, n),
    # Grams, one inversion, two products.
    "grad_norm_objective": lambda heads, h, n, double: triangles(heads, h, n) + 6.0 * heads * h**3,
    "matrix_exp": lambda heads, h, n, double: 2.0 * ONE[double] * heads * h**3,
    "matrix_exp_pair": lambda heads, h, n, double: 2.0 * PAIR[double] * heads * h**3,
    "group_action_": lambda heads, h, n, double: 4.0 * heads * h * h * n,
    "covariance_": lambda heads, h, n, double: triangles(heads, h, n) + 2.0 * heads * h * h,
    "square_sums": lambda heads, h, n, double: 4.0 * heads * h * n,
    "diagonal_action_": lambda heads, h, n, double: 2.0 * heads * h * n,
    # None: a move of an entry counts as one, so that it has a place in the picture.
    "permutation_action_": lambda heads, h, n, double: 2.0 * heads * h * n,
    "teleport_adamw_": lambda heads, h, n, double: float(MOVED_ADAM) * heads * h * n,
    "rotate_step_": lambda heads, h, n, double: heads * h * n * (4.0 * h + ADAM),
    "rotate_step_ both sides": lambda heads, h, n, double: heads * h * n * (4.0 * h + 4.0 * n + ADAM),
    "activation_action": lambda heads, h, n, double: h * n * (2.0 * h + 4),
    "activation_action_tangent": lambda heads, h, n, double: h * n * (2.0 * h + 4),
    # The image, Householder's QR with its Q, and the turn.
    "orthogonal_iteration_": lambda heads, h, n, double: (2 + 8 / 3 + 2) * heads * h**3,
}
