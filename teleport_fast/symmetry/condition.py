"""Condition numbers of group elements, for those who ask: on a GPU they make the host wait, and cost as much as an exponential."""

from __future__ import annotations

import torch
from torch import Tensor


def condition_numbers(g: Tensor) -> Tensor:
    """κ₂ = σ_max / σ_min of each matrix of g (heads, h, h), (heads,), float32 at least.

    Source: definition; tests/symmetry/test_condition.py.

    >>> condition_numbers(torch.diag(torch.tensor([4.0, 1.0, 0.5]))[None])
    tensor([8.])
    """
    values: Tensor = torch.linalg.svdvals(g.to(torch.promote_types(g.dtype, torch.float32)))
    return values[:, 0] / values[:, -1]


def diagonal_condition_number(g: Tensor) -> Tensor:
    """max |g| / min |g| of each row of g (heads, h), the largest of all rows'; 0-d.

    >>> diagonal_condition_number(torch.tensor([[1.0, -2.0], [1.0, 1.0]]))
    tensor(2.)
    """
    size = g.abs()
    return (size.amax(-1) / size.amin(-1)).amax()
