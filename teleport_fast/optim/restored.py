"""What `Rotated` takes from a checkpoint: the same numbers, in its own dtypes, on its own devices and in its own shards."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_fast.distributed.gradient import in_layout
from teleport_fast.distributed.layout import Layout, layout_of
from teleport_fast.ops.checks import accumulation_dtype
from teleport_fast.optim.sharded import Placing
from teleport_fast.optim.sides import Assignment, Side

COUNTERS = ("step", "rows_age", "columns_age")


def restored_moment(
    key: str, value: Tensor, parameter: Tensor, assignment: Assignment, placing: Placing | None
) -> Tensor:
    """A copy of a moment, laid out as it is stepped. Errors: ValueError for another shape than the parameter's."""
    dtype = accumulation_dtype(parameter.dtype) if assignment.turned else parameter.dtype
    _check(key, value, assignment, tuple(parameter.shape))
    layout = placing.work.layout if placing is not None else layout_of(parameter)
    return in_layout(value.detach(), layout).to(parameter.device, dtype, copy=True)


def restored_basis(
    key: str, value: Tensor, parameter: Tensor, assignment: Assignment, side: Side | None, dtype: torch.dtype
) -> Tensor:
    """A copy of a basis, a covariance or its flag, whole on every rank. Errors: ValueError for another shape."""
    if key.endswith("_ill"):
        return value.detach().to(parameter.device, copy=True)
    shape = (side.heads, side.width, side.width) if side else ()
    _check(key, value, assignment, shape)
    return in_layout(value.detach(), Layout(shape)).to(parameter.device, dtype, copy=True)


def _check(key: str, value: Tensor, assignment: Assignment, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(
            f"state_dict: {key!r} of {assignment.name!r} is {tuple(value.shape)} and this optimizer holds {shape}; "
            f"load it into a Rotated made with the same stream, heads, hidden, sides, symmetries and max_side"
        )
