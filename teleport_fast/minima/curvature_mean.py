"""Curvature of a minimum along its symmetry: the mean curvature of exp(tM)·w over random M."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.minima.lie_curve import curve_derivatives


def curvature(action: MLPAction, Ms: Sequence[Tensor], interactions: bool = True) -> float:
    """ψ(w): κ = sqrt(‖γ'‖²‖γ''‖² − ⟨γ', γ''⟩²)/‖γ'‖³ of γ(t) = exp(tM)·w at 0, mean over the draws in Ms [ICLR24].

    Ms[m] (h_m, h_m) or (draws, h_m, h_m), one per hidden layer; interactions=False as published, see `curve_derivatives`.
    ValueError where some M does not move the weights at all.

    >>> W = [torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    >>> action = tf.data_dependent.MLPAction(W, torch.randn(5, 3, dtype=torch.float64))
    >>> tf.curvature(action, tf.minima.random_generators(action, 8)) > 0
    True
    """
    return float(curvature_of(*curve_derivatives(action, Ms, interactions)).mean())


def curvature_of(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """κ (draws,) or scalar from γ' and γ'' by layer, (draws, out, in) or (out, in): ‖γ'' − γ'⟨γ', γ''⟩/‖γ'‖²‖/‖γ'‖².

    The formula of `curvature` without its difference of squares, which loses half the digits where γ is nearly straight.

    >>> curvature_of([torch.tensor([[0.0, 2.0]])], [torch.tensor([[-2.0, 0.0]])])
    tensor(0.5000)
    """
    speed = torch.stack([v.square().sum((-2, -1)) for v in first]).sum(0)
    if not bool((speed > 0).all()):
        raise ValueError("Ms must move the weights, got a curve with γ' = 0, which has no curvature; draw M at random")
    along = torch.stack([(v * a).sum((-2, -1)) for v, a in zip(first, second, strict=True)]).sum(0) / speed
    across = torch.stack(
        [(a - along[..., None, None] * v).square().sum((-2, -1)) for v, a in zip(first, second, strict=True)]
    ).sum(0)
    return across.sqrt() / speed


def random_generators(action: MLPAction, count: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Ms for `curvature`: standard normal (count, h_m, h_m) for every hidden layer, in the weights' dtype and device.

    >>> W = [torch.zeros(4, 5), torch.zeros(2, 4)]
    >>> [M.shape for M in random_generators(tf.data_dependent.MLPAction(W, torch.zeros(5, 3)), 8)]
    [torch.Size([8, 4, 4])]
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}; the papers take a mean over random M")
    X = action.X
    return [torch.randn(count, k, k, generator=generator, dtype=X.dtype, device=X.device) for k in action.widths]
