"""Weight balance as an objective: ‖gA₊‖² + ‖g⁻ᵀA₋‖², lowest where producers and consumers share the scale evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.objectives.base import Move, Objective
from teleport_fast.objectives.dual_norm import diagonal_powers, mixed_powers
from teleport_fast.search import diagonal_extremum, geodesic_descent, trust_region_ascent
from teleport_fast.symmetry.bucket import Bucket, Element
from teleport_fast.symmetry.joint import Joint


class Balance(Objective):
    """The squared norm of the weights along the orbit; needs no gradient to decide, descends to the minimum by default.

    The gradient-norm formulas with the two sides exchanged: W₋ = A₋A₋ᵀ in the place of S₊, W₊ in that of S₋
    (docs/mathematics.md). The minimum is the geometric mean, exact in one move per joint.
    """

    name = "balance"
    directions = ("descend", "ascend")
    closed_form = ("descend",)
    measures = "parameters"

    def default_radius(self, direction: str) -> float:
        return math.inf if direction == "descend" else 0.5

    def unusable(self, joint: Joint) -> str | None:
        if not joint.group.holds_stretches:
            return f"{joint.group} leaves the norm of the weights as it is"
        if any(view.shift for view in joint.views()):
            return "a gain stored with a shift: the action does not scale the stored numbers"
        return mixed_powers(joint)

    def reads(self, bucket: Bucket, descend: bool) -> tuple[tuple[str, str], ...]:
        return (("squares" if bucket.group.form == "diagonal" else "grams", "parameters"),)

    def decide(self, index: int, bucket: Bucket, sums: Sequence[Tensor], move: Move) -> tuple[Element, Tensor] | None:
        if bucket.group.form == "diagonal":
            k_plus, k_minus = diagonal_powers(bucket)
            b, a = sums
            t = diagonal_extremum(a, 2 * k_minus, b, 2 * k_plus, move.radius, move.descend)
            return Element("diagonal", t.exp()), t.abs().amax()
        weight_plus, weight_minus = sums
        if move.descend:
            return geodesic_descent(bucket.group, weight_minus, weight_plus, move.radius, move.max_condition)
        return trust_region_ascent(bucket.group, weight_minus, weight_plus, move.radius)

    def value(self, move: Move) -> Tensor:
        norms = torch._foreach_norm(list(move.parameters.values()))
        return torch.stack([norm.double() for norm in norms]).square().sum()
