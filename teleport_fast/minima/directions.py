"""Random unit directions in the space of all parameters, drawn one at a time so that only one is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from teleport_fast.minima.point import checked_parameters


def sphere_directions(params: Iterable[Tensor], count: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """`count` directions (P,) uniform on the unit sphere, P entries of all params in order, in their dtype and device.

    Normal entries, divided by their norm. ValueError for a count under 1.

    >>> [d] = sphere_directions([torch.zeros(3, 2), torch.zeros(4)], 1)
    >>> d.shape, round(d.norm().item(), 6)
    (torch.Size([10]), 1.0)
    """
    return _draw(torch.randn, params, count, generator)


def orthant_directions(params: Iterable[Tensor], count: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """`count` directions (P,) u/‖u‖ with u uniform on [0, 1)ᴾ, as published [ICLR24]: every entry is positive.

    Not the sphere: the mean direction is (1, ..., 1)/√P times .87, so the mean loss sees one side of the minimum only.

    >>> [d] = orthant_directions([torch.zeros(10)], 1)
    >>> bool((d >= 0).all())
    True
    """
    return _draw(torch.rand, params, count, generator)


def _draw(
    sample: object, params: Iterable[Tensor], count: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    tensors = checked_parameters(params)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}; more directions make the mean more certain")
    assert callable(sample)
    size, like = sum(p.numel() for p in tensors), tensors[0]
    draws = (sample(size, generator=generator, dtype=like.dtype, device=like.device) for _ in range(count))
    return (u / torch.linalg.vector_norm(u) for u in draws)
