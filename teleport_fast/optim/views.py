"""Views of a matrix along one of its sides, and the part of its columns whose turn it is."""

from __future__ import annotations

from torch import Tensor

# Fewest columns of a gradient that a covariance takes up, and what their bounds are multiples of.
LEAST_PART, PART_STEP = 32, 16


def view_of(tensor: Tensor, axis: int, heads: int) -> Tensor:
    """The (heads, width, rest) alias of a matrix whose `axis` is heads × width.

    >>> import torch
    >>> view_of(torch.ones(6, 4), 0, 2).shape, view_of(torch.ones(6, 4), 1, 1).shape
    (torch.Size([2, 3, 4]), torch.Size([1, 4, 6]))
    """
    # one call: an mT and an unflatten take three times as long, and a step makes hundreds of views
    step, inner = tensor.stride(axis), tensor.stride(1 - axis)
    width = tensor.shape[axis] // heads
    return tensor.as_strided((heads, width, tensor.shape[1 - axis]), (width * step, step, inner))


def part_bounds(n: int, parts: int, turn: int) -> tuple[int, int]:
    """The columns [begin, end) of n that are number `turn` of `parts` in turn; of fewer parts where they would be too narrow.

    >>> part_bounds(128, 3, 4), part_bounds(40, 3, 4)
    ((32, 80), (0, 40))
    """
    parts = min(parts, n // LEAST_PART)
    if parts < 2:
        return 0, n
    part = turn % parts
    begin, end = (n * at // parts // PART_STEP * PART_STEP if at < parts else n for at in (part, part + 1))
    return begin, end


def part_of(view: Tensor, parts: int, turn: int) -> Tensor:
    """Those columns of a (heads, h, n) view.

    >>> import torch
    >>> part_of(torch.ones(1, 8, 128), 3, 4).shape
    torch.Size([1, 8, 48])
    """
    begin, end = part_bounds(view.shape[2], parts, turn)
    return view[:, :, begin:end]
