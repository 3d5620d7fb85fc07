"""The norm of many tensors, in float64, and their clipping to one; nothing is read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from teleport_fast.writes import Write

# entries whose norm is taken at once on a CPU
PIECE = 16384


def total_norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """In float64, where finite float32 entries of 1e25 still have a finite norm."""
    pieces = [piece for tensor in tensors.values() for piece in _pieces(tensor)]
    whole: Tensor = torch.stack(list(torch._foreach_norm(pieces, 2, torch.float64))).norm()
    return whole


def clipping(
    gradients: Iterable[Tensor],
    measured: Mapping[str, Tensor],
    max_norm: float | None,
    norm: Callable[[Mapping[str, Tensor]], Tensor] = total_norm,
) -> list[Write]:
    """What scales gradients so that the norm of `measured` comes to `max_norm`, as torch.nn.utils.clip_grad_norm_."""
    if max_norm is None:
        return []
    factor = (max_norm / (norm(measured) + 1e-6)).clamp(max=1.0)
    return [partial(_scale_, gradient, factor) for gradient in gradients]


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    gradient.mul_(factor.to(gradient.device, gradient.dtype, non_blocking=True))


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """On a CPU torch widens a tensor before it takes the norm: blocks of rows, so that it never holds a wide embedding."""
    if tensor.device.type != "cpu" or tensor.numel() <= PIECE:
        return (tensor,)
    pieces: tuple[Tensor, ...] = tensor.split(max(1, PIECE * tensor.shape[0] // tensor.numel()))
    return pieces
