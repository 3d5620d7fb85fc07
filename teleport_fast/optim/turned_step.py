"""One bucket of `Rotated`'s step: matrices of one shape in their bases, fused where `rotate_step_` knows the base map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.checks import accumulation_dtype
from teleport_fast.ops.rotate_step import BASES as FUSED
from teleport_fast.ops.rotate_step import base_map_, rotate_step_, turn

BASES = (*FUSED, "sinkhorn")
SINKHORN_ROUNDS = 5


def sinkhorn(matrix: Tensor, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """Rows, then columns brought to root mean square 1, `rounds` times; zero rows and columns stay zero. (m, n).

    Source: Scetbon et al., Gradient Multi-Normalization, arXiv 2502.06742, algorithm 3.

    >>> sinkhorn(torch.tensor([[1.0, 10.0], [100.0, -1000.0]]))
    tensor([[ 1.,  1.],
            [ 1., -1.]])
    """
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(rounds):
        for axis in (1, 0):
            matrix = matrix / matrix.square().mean(axis, keepdim=True).sqrt().clamp_min(tiny)
    return matrix


@torch.no_grad()
def step_bucket_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    left: Sequence[Tensor] | None,
    right: Sequence[Tensor] | None,
    *,
    base: str,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    match_rms: float | None,
) -> None:
    """`rotate_step_` of views (heads, h, n), with base "sinkhorn" too, and updates scaled to a root mean square."""
    if base in FUSED and match_rms is None:
        rotate_step_(
            parameters,
            gradients,
            first_moments,
            second_moments,
            left,
            right,
            base=base,
            step=step,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
        )
        return
    dtype = accumulation_dtype(parameters[0].dtype)
    for i, (parameter, gradient, moment) in enumerate(zip(parameters, gradients, first_moments, strict=True)):
        L, R = left[i].to(dtype) if left else None, right[i].to(dtype) if right else None
        G = turn(gradient.to(dtype), L, R)
        if base == "sinkhorn":
            moment.lerp_(G, 1 - betas[0])
            U = sinkhorn(moment.flatten(0, 1)).view(moment.shape)
        else:
            square = second_moments[i] if second_moments else None
            U = base_map_(G, moment, square, FUSED.index(base), step, *betas, eps)
        if match_rms is not None:
            U = U * (match_rms / U.square().mean().sqrt().clamp_min(torch.finfo(dtype).tiny))
        A = parameter.to(dtype)
        A.mul_(1 - lr * weight_decay).sub_(turn(U, L, R, back=True), alpha=lr)
        if A.data_ptr() != parameter.data_ptr():
            parameter.copy_(A)
