"""CLIP's common space: two projections whose outputs meet only in a (cosine) product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from teleport_fast.discovery.candidates import Candidate, Views, maker
from teleport_fast.discovery.roles import Role, builder, find, join
from teleport_fast.discovery.slots import Slot
from teleport_fast.symmetry.diagonal_groups import PositiveDiagonal
from teleport_fast.symmetry.groups import GeneralLinear, Orthogonal
from teleport_fast.symmetry.joint import Joint


@dataclass(frozen=True)
class Contrast(Role):
    """The two last layers of a contrastive model."""

    name: str
    first: Slot
    second: Slot

    def reads(self) -> list[Slot]:
        return [self.first, self.second]

    def writes(self) -> list[Slot]:
        return []


@builder
def contrast(name: str, module: nn.Module) -> Iterator[Contrast]:
    first, second = find(name, module, ("text_projection",)), find(name, module, ("visual_projection",))
    if first is not None and second is not None and first.size == second.size:
        yield Contrast(name, first, second)


@maker(Contrast)
def contrast_candidates(role: Role, views: Views) -> Iterator[Candidate]:
    """GL between the projections, O where the product is a cosine; then each one's scale alone."""
    assert isinstance(role, Contrast)
    width, name = role.first.size, join(role.name, "common-space")
    plus, minus = views.rows(role.first, 1, width), views.rows(role.second, 1, width)
    joints = tuple(
        Joint(name, "common-space", group, 1, width, plus, minus) for group in (GeneralLinear(width), Orthogonal(width))
    )
    yield Candidate(name, "common-space", joints, "the projections meet in more than a product")
    for slot, rows in ((role.first, plus), (role.second, minus)):
        one = tuple(replace(view, width=1, repeats=width, repeat_stride=1, head_stride=width) for view in rows)
        scale = Joint(f"{slot.layer}.scale", "scale", PositiveDiagonal(1), 1, 1, one, ())
        yield Candidate(scale.name, "scale", (scale,), "the product is no cosine: the projection's size is seen")
