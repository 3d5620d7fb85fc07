"""Shampoo (Gupta, Koren, Singer, arXiv 1802.09568), with the moving averages and the grafting of arXiv 2309.06497.

pytorch_optimizer 4.1.0's Shampoo blends each gradient with the last *preconditioned* one and transposes gradients in place,
which is neither paper; so this reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Shampoo(Optimizer):
    """W ← W − lr ‖A‖/‖D‖ D, D = L^(−1/4) M R^(−1/4), L ← β₂ L + (1 − β₂) G Gᵀ, R alike, A Adam's step: grafting.

    Tensors of more dimensions are matrices of their first one; vectors take Adam's step. Roots are taken every `every` steps.

    >>> w = torch.nn.Parameter(torch.eye(2))
    >>> optimizer = Shampoo([w], lr=0.1)
    >>> w.square().sum().backward(); optimizer.step()
    >>> bool(w[0, 0] < 1)
    True
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8,
        ridge: float = 1e-6, every: int = 10,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "ridge": ridge, "every": every})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean = state["exp_avg"] / (1 - first ** state["step"])
        spread = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt()
        adam = mean / (spread + group["eps"])
        if parameter.ndim < 2:
            parameter.sub_(adam, alpha=group["lr"])
            return
        G = gradient.flatten(1)
        for side, factor in (("left", G @ G.mT), ("right", G.mT @ G)):
            state[side] = factor * (1 - second) if side not in state else state[side].mul_(second).add_(factor, alpha=1 - second)
            if (state["step"] - 1) % group["every"] == 0:
                state[f"{side}_root"] = _root(state[side] / (1 - second ** state["step"]), group["ridge"])
        D = state["left_root"] @ mean.flatten(1) @ state["right_root"]
        size = float(adam.norm()) / max(float(D.norm()), 1e-30)
        parameter.sub_(D.view_as(parameter), alpha=group["lr"] * size)


def _root(C: Tensor, ridge: float) -> Tensor:
    """(C + ridge · largest eigenvalue)^(−1/4)."""
    values, vectors = torch.linalg.eigh(C)
    largest = float(values[-1])
    if not math.isfinite(largest) or largest <= 0:
        return torch.eye(len(C), dtype=C.dtype)
    return (vectors * (values.clamp_min(0) + ridge * largest) ** -0.25) @ vectors.mT
