"""A fixed element per joint as objective: for tests, controls and users who computed g themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from teleport_fast.objectives.base import Move, Objective
from teleport_fast.symmetry.bucket import Bucket, Element
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries


class Fixed(Objective):
    """Moves every named joint by the element given for it, at each teleport.

    elements: {joint name: g} in the group's form; joints that are not named stay.
    Errors: ValueError at `attach` if a joint does not exist or an element is not in its joint's group.
    """

    name = "fixed"
    reads_tensors = False
    directions = ("ascend",)

    def __init__(self, elements: Mapping[str, Tensor]) -> None:
        self.elements = dict(elements)

    def check(self, symmetries: Symmetries) -> None:
        for name, g in self.elements.items():
            if name not in symmetries:
                raise ValueError(f"elements name the joint {name!r}, which was not found; see symmetries.explain()")
            joint = symmetries[name]
            try:
                Element.of(joint.group, joint.group.check(g, joint.heads, name))
            except torch.linalg.LinAlgError:
                raise ValueError(f"element of joint {name!r} is singular; pass an invertible element") from None

    def unusable(self, joint: Joint) -> str | None:
        return None if joint.name in self.elements else "no element was given for this joint"

    def decide(self, index: int, bucket: Bucket, sums: Sequence[Tensor], move: Move) -> tuple[Element, Tensor] | None:
        like = move.parameters[bucket.joints[0].parameters()[0]]
        checked = [joint.group.check(self.elements[joint.name], joint.heads, joint.name) for joint in bucket.joints]
        g = torch.cat(checked).to(like.device)
        if g.is_floating_point():
            g = g.to(torch.promote_types(like.dtype, torch.float32))
        return Element.of(bucket.group, g), torch.full((), float("nan"))

    def value(self, move: Move) -> Tensor:
        norms = torch._foreach_norm(list(move.gradients.values()))
        return torch.stack([norm.double() for norm in norms]).square().sum()
