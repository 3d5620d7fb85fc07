"""The gradients of one step and their norm: gathered, unscaled and measured when somebody asks, clipped after a move."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.called import unscale_
from teleport_fast.plan import Plan
from teleport_fast.writes import Write

# entries whose norm is taken at once on a CPU
PIECE = 16384


class Gradients:
    """All gradients of one step and their norm, unscaled and gathered when somebody asks."""

    __slots__ = ("_everything", "_norm", "_optimizer", "_plan")

    def __init__(self, plan: Plan, optimizer: Optimizer) -> None:
        self._plan, self._optimizer = plan, optimizer
        self._everything: dict[str, Tensor] | None = None
        self._norm: float | None = None

    def everything(self) -> dict[str, Tensor]:
        if self._everything is None:
            with torch.no_grad():
                unscale_(self._optimizer)
            self._everything = self._plan.gradients(self._optimizer)
        return self._everything

    def norm(self) -> float:
        if self._norm is None:
            with torch.no_grad():
                self._norm = float(total_norm(self.everything()))
        return self._norm


def clipping(gradients: Iterable[Tensor], measured: dict[str, Tensor], max_norm: float | None) -> list[Write]:
    """What scales gradients so that the norm of `measured` comes to `max_norm`, as torch.nn.utils.clip_grad_norm_; no read-back."""
    if max_norm is None:
        return []
    factor = (max_norm / (total_norm(measured) + 1e-6)).clamp(max=1.0)
    return [partial(_scale_, gradient, factor) for gradient in gradients]


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    gradient.mul_(factor.to(gradient.device, gradient.dtype, non_blocking=True))


def total_norm(tensors: dict[str, Tensor]) -> Tensor:
    """In float64, where finite float32 entries of 1e25 still have a finite norm."""
    pieces = [piece for tensor in tensors.values() for piece in _pieces(tensor)]
    return torch.stack(list(torch._foreach_norm(pieces, 2, torch.float64))).norm()


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """On a CPU torch widens a tensor before it takes the norm: blocks of rows, so that it never holds a wide embedding."""
    if tensor.device.type != "cpu" or tensor.numel() <= PIECE:
        return (tensor,)
    return tensor.split(max(1, PIECE * tensor.shape[0] // tensor.numel()))
