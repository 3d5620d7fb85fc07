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


def turn_blocks(G: Tensor, left: Tensor | None, right: Tensor | None, back: bool = False) -> Tensor:
    """L G Rᵀ, or Lᵀ G R on the way back; G: (heads, h, blocks·w), left: (heads, h, h), right: (blocks, w, w).

    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> turn_blocks(torch.arange(4.0).view(1, 1, 4), None, torch.stack((swap, torch.eye(2))))
    tensor([[[1., 0., 2., 3.]]])
    """
    if right is None or len(right) == 1:
        return turn(G, left, None if right is None else right[0], back)
    blocks: Tensor = turn(G, left, None, back).unflatten(2, (len(right), -1)).unsqueeze(-2)
    return (blocks @ (right if back else right.mT)).flatten(2)


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
    nesterov: bool,
    match_rms: float | None,
) -> None:
    """`rotate_step_` of views (heads, h, n), with base "sinkhorn" too, and updates scaled to a root mean square.

    left: (heads, h, h) per parameter; right: (blocks, w, w) per parameter, n = blocks·w, shared by the heads.
    """
    blocks = len(right[0]) if right else 1
    if base in FUSED and match_rms is None and (blocks == 1 or base != "row_norm"):

        def columns(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            return tensors if blocks == 1 else [part for tensor in tensors for part in tensor.chunk(blocks, -1)]

        rotate_step_(
            columns(parameters),
            columns(gradients),
            columns(first_moments),
            columns(second_moments),
            [basis for basis in left for _ in range(blocks)] if left else None,
            [block for basis in right for block in basis] if right else None,
            base=base,
            step=step,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
        return
    dtype = accumulation_dtype(parameters[0].dtype)
    for i, (parameter, gradient, moment) in enumerate(zip(parameters, gradients, first_moments, strict=True)):
        L, R = left[i].to(dtype) if left else None, right[i].to(dtype) if right else None
        G = turn_blocks(gradient.to(dtype), L, R)
        if base == "sinkhorn":
            moment.lerp_(G, 1 - betas[0])
            ahead = moment.lerp(G, 1 - betas[0]) if nesterov else moment
            U = sinkhorn(ahead.flatten(0, 1)).view(moment.shape)
        else:
            square = second_moments[i] if second_moments else None
            U = base_map_(G, moment, square, FUSED.index(base), step, *betas, eps, nesterov)
        if match_rms is not None:
            U = U * (match_rms / U.square().mean().sqrt().clamp_min(torch.finfo(dtype).tiny))
        A = parameter.to(dtype)
        A.mul_(1 - lr * weight_decay).sub_(turn_blocks(U, L, R, back=True), alpha=lr)
        if A.data_ptr() != parameter.data_ptr():
            parameter.copy_(A)
