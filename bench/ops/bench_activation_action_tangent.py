"""activation_action_tangent, (M σ(Z)) / σ'(Z), at the shapes of bench_activation_action.py, which times the action with pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from bench_activation_action import SIZES, cases_of

from teleport_fast.ops import activation_action_tangent

__all__ = ["OP", "SIZES", "cases"]

OP = "activation_action_tangent"


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`."""
    yield from cases_of(activation_action_tangent, size, dtype)
