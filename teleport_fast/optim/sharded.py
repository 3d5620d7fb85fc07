"""Matrices that are sharded over ranks: in which layout each side is turned, and what this rank has of it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teleport_fast.distributed.blocks import Spread, exchange, spread_of
from teleport_fast.distributed.gradient import from_part
from teleport_fast.distributed.layout import Layout, as_dtensor, layout_of, local_part
from teleport_fast.distributed.refuse import is_ragged
from teleport_fast.ops.group_action import group_action_
from teleport_fast.optim.sides import Assignment, Side
from teleport_fast.optim.views import view_of

# Base maps of single entries, which a rank can do with what it holds; others look at whole rows, columns or matrices.
ELEMENTWISE = ("adam", "sign")


@dataclass(frozen=True, eq=False)
class Placing:
    """Where a sharded matrix is stepped: `work` is the layout of its moments, `at` the layout in which each side is turned.

    A side is turned where no rank holds a part of one of its blocks: at `home`, the parameter's own layout, or at work.
    """

    home: Spread
    work: Spread
    at: tuple[Spread | None, Spread | None]

    @property
    def stays(self) -> bool:
        """Whether gradient and update never leave their rank."""
        return self.work is self.home

    @property
    def turns_at_home(self) -> list[int]:
        """Axes that are turned before the gradient goes to work."""
        return [axis for axis in (0, 1) if not self.stays and self.at[axis] is self.home]

    @property
    def works_elsewhere(self) -> bool:
        """Whether some side's covariance needs the gradient as it is at work."""
        return not self.stays and any(spread is self.work for spread in self.at)

    @property
    def note(self) -> str:
        """What the table says of it."""
        ranks = len(self.home.blocks)
        if self.stays:
            return f"stepped where it lies, on {ranks} ranks"
        if self.work.replicated:
            return f"gathered on each of {ranks} ranks at every step"
        axis = "columns" if self.work.keeps_whole(0, max(1, self.work.shape[0])) else "rows"
        return f"stepped by {axis} on {ranks} ranks, with an all-to-all there and one back"


def placing_of(assignment: Assignment, layout: Layout, elementwise: bool) -> Placing | None:
    """The plan for one parameter, the same on every rank; None where it is no matrix that is turned.

    Errors: ValueError for placements of which torch cannot tell which rank holds what.
    """
    if assignment.sides is None or layout.mesh is None:
        return None
    if is_ragged(layout):
        raise ValueError(
            f"{assignment.name!r} lies as {', '.join(map(str, layout.placements))} with parts of unequal length, for which torch "
            f"keeps no account of who holds what; choose a dimension that the ranks divide (shard_placement_fn of fully_shard)"
        )
    from torch.distributed.tensor import Replicate, Shard

    over, sides = layout.everywhere, assignment.sides
    turned = [axis for axis in (0, 1) if sides[axis].basis]

    def everywhere(placement: Any) -> Spread:
        placements = tuple(placement if d in over.dims else Replicate() for d in range(len(layout.placements)))
        return spread_of(Layout(layout.shape, layout.mesh, placements), over)

    def placing(work: Spread) -> Placing:
        rows, columns = (None if a not in turned else work if kept(work, a) else home for a in (0, 1))
        return Placing(home, work, (rows, columns))

    def kept(layout: Spread, axis: int) -> bool:
        return layout.keeps_whole(axis, sides[axis].width)

    home = spread_of(layout, over)
    if home.replicated or (elementwise and all(kept(home, axis) for axis in turned)):
        return placing(home)
    found = [
        placing(work)
        for work in (everywhere(Shard(1)), everywhere(Shard(0)))
        if elementwise and all(kept(work, axis) or kept(home, axis) for axis in turned)
    ]
    return min(found, key=lambda each: len(each.turns_at_home), default=None) or placing(everywhere(Replicate()))


class Placings:
    """The placings of an optimizer's parameters, found once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Placing | None] = {}

    def of(self, assignment: Assignment, parameter: Tensor, base: str, match_rms: float | None) -> Placing | None:
        """The placing of this parameter, None where it is whole."""
        if as_dtensor(parameter) is None:
            return None
        elementwise = base in ELEMENTWISE and match_rms is None
        layout = layout_of(parameter)
        # matrices of one shape and the same blocks lie alike, whatever they are called
        turned = None if assignment.sides is None else tuple(side.width if side.basis else 0 for side in assignment.sides)
        key = (layout, turned, elementwise)
        if key not in self._found:
            self._found[key] = placing_of(assignment, layout, elementwise)
        return self._found[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"_found": {}}


def moment_like(parameter: Tensor, placing: Placing | None, dtype: torch.dtype) -> Tensor:
    """Zeros of the parameter's shape in the layout in which it is stepped."""
    if placing is None or placing.stays:
        return torch.zeros_like(parameter, dtype=dtype)
    part = torch.zeros(placing.work.local_shape, dtype=dtype, device=local_part(parameter).device)
    return from_part(part, placing.work.layout)


def rows_of(side: Side, spread: Spread, axis: int) -> slice:
    """Which of a side's bases this rank turns by in a layout that keeps them whole."""
    begin, end = spread.mine[axis]
    return slice(begin // side.width, end // side.width)


def turn_(tensors: Sequence[tuple[Tensor, Placing, int, Side, tuple[Tensor, ...]]]) -> None:
    """A ← g A along the axis, in place; each (this rank's part at work, placing, axis, side, one or more g (heads, h, h), in turn)."""
    away = [entry for entry in tensors if entry[1].at[entry[2]] is not entry[1].work]
    moved = exchange([entry[0] for entry in away], [(entry[1].work, entry[1].home) for entry in away])
    by_identity = {id(entry[0]): there for entry, there in zip(away, moved, strict=True)}
    for tensor, placing, axis, side, turns in tensors:
        spread = placing.at[axis]
        assert spread is not None
        own = rows_of(side, spread, axis)
        held = by_identity.get(id(tensor), tensor) if spread is not placing.work else tensor
        if own.start < own.stop and held.numel():
            for g in turns:
                group_action_([view_of(held, axis, own.stop - own.start)], [], g[own])
    back = exchange(moved, [(entry[1].home, entry[1].work) for entry in away])
    for entry, tensor in zip(away, back, strict=True):
        entry[0].copy_(tensor)
