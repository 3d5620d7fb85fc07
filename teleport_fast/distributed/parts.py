"""A bucket as one rank sees it: the joints' pieces that lie here, and the tensors that must be laid out anew first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teleport_fast.distributed.layout import Layout
from teleport_fast.distributed.pieces import Span, is_cut, pieces, uncut
from teleport_fast.symmetry.bucket import Bucket, Element
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

Sides = tuple[list[View], list[View], list[View]]
Table = dict[tuple[Span, Span], dict[int, Sides]]
Keep = Callable[[Layout], bool]


@dataclass(frozen=True)
class Part:
    """Some heads and units of some of a bucket's joints, with the views of this rank's tensors that show them."""

    bucket: Bucket
    joints: tuple[int, ...]
    heads: Span
    units: Span

    def of(self, element: Element, whole: Bucket) -> Element:
        """The rows of a whole bucket's element that act on this part."""
        if self._is_all(whole):
            return element
        inverse = element.g_inverse_t
        return Element(element.form, self._rows(element.g, whole), None if inverse is None else self._rows(inverse, whole))

    def add_(self, total: Tensor, values: Tensor, whole: Bucket) -> None:
        """Add this part's sums, (joints·heads, h, …), to those of the whole bucket."""
        if self._is_all(whole):
            total.add_(values)
            return
        places = total.unflatten(0, (len(whole.joints), whole.heads))
        values = values.unflatten(0, (len(self.joints), -1))
        for joint, value in zip(self.joints, values, strict=True):
            place = places[joint, self.heads[0] : self.heads[1], self.units[0] : self.units[1]]
            place.add_(value)

    def _is_all(self, whole: Bucket) -> bool:
        every = len(self.joints) == len(whole.joints)
        return every and self.heads == (0, whole.heads) and self.units == (0, whole.width)

    def _rows(self, g: Tensor, whole: Bucket) -> Tensor:
        rows: Tensor = g.unflatten(0, (len(whole.joints), whole.heads))[list(self.joints), self.heads[0] : self.heads[1]]
        return rows[:, :, self.units[0] : self.units[1]].flatten(0, 1).contiguous()


@dataclass(frozen=True)
class Turn:
    """A parameter whose heads are cut: it is laid out by other placements first, and has these parts then."""

    parameter: str
    placements: tuple[Placement, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Local:
    """All that one rank holds of a bucket."""

    parts: tuple[Part, ...]
    turns: tuple[Turn, ...]


def local_of(bucket: Bucket, layouts: Mapping[str, Layout], keep: Keep) -> Local:
    """The rank's part of a bucket whose tensors lie by `layouts` (plain where one is missing); views not kept are left out.

    Turns are the same on all ranks, in one order: they are collectives.
    """
    table: Table = {}
    turns: list[Turn] = []
    whole_units = bucket.group.form != "diagonal"
    for index, joint in enumerate(bucket.joints):
        by_name: dict[str, Sides] = {}
        for side, shown in enumerate((joint.plus, joint.minus, joint.carried)):
            for view in shown:
                by_name.setdefault(view.parameter, ([], [], []))[side].append(view)
        for name, sides in by_name.items():
            layout = layouts.get(name)
            views = [view for side in sides for view in side]
            if whole_units and layout is not None and any(is_cut(view, layout) for view in views):
                placements = uncut(views, layout)
                own: Table = {}
                turned = replace(layout, placements=placements)
                if keep(turned):
                    _enter(own, index, sides, turned)
                turns.append(Turn(name, placements, _parts(bucket, own)))
            elif layout is None or keep(layout):
                _enter(table, index, sides, layout)
    return Local(_parts(bucket, table), tuple(turns))


def _enter(table: Table, index: int, sides: Sides, layout: Layout | None) -> None:
    for side, views in enumerate(sides):
        for view in views:
            if layout is None or layout.mesh is None:
                found = [(view, (0, view.heads), (0, view.width))]
            else:
                found = [(piece.view, piece.heads, piece.units) for piece in pieces(view, layout)]
            for part, heads, units in found:
                table.setdefault((heads, units), {}).setdefault(index, ([], [], []))[side].append(part)


def _parts(bucket: Bucket, table: Table) -> tuple[Part, ...]:
    """One part for all joints that show the same heads and units by as many views."""
    found: list[Part] = []
    for (heads, units), by_joint in sorted(table.items(), key=lambda item: item[0]):
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, sides in by_joint.items():
            alike.setdefault(tuple(map(len, sides)), []).append(index)
        for indices in alike.values():
            joints = tuple(_joint(bucket.joints[index], by_joint[index], heads, units) for index in indices)
            found.append(Part(Bucket(joints), tuple(indices), heads, units))
    return tuple(found)


def _joint(joint: Joint, sides: Sides, heads: Span, units: Span) -> Joint:
    width = units[1] - units[0]
    group = joint.group if width == joint.width else replace(joint.group, width=width)
    plus, minus, carried = map(tuple, sides)
    if not plus and not minus:  # nothing but a buffer lies here, which moves as a writer does
        plus, carried = carried, ()
    return replace(joint, group=group, heads=heads[1] - heads[0], width=width, plus=plus, minus=minus, carried=carried)


def zeros(bucket: Bucket, dimensions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sums of nothing: (joints·heads, h) or (joints·heads, h, h)."""
    shape = (len(bucket.joints) * bucket.heads, *([bucket.width] * dimensions))
    return torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
