"""Gradient norms as objectives: squared Frobenius (the papers' ‖∇L‖²) and l1 (sign-like optimizers)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.objectives.base import Move, Objective
from teleport_fast.search import (
    diagonal_extremum,
    exponential,
    geodesic_descent,
    lie_step,
    trust_region_ascent,
)
from teleport_fast.symmetry.bucket import Bucket, Element
from teleport_fast.symmetry.groups import DenseGroup
from teleport_fast.symmetry.joint import Joint


def mixed_powers(joint: Joint) -> str | None:
    """Why the closed form of a diagonal does not hold for this joint, or None."""
    if joint.group.form == "diagonal" and any(len({v.power for v in s}) > 1 for s in (joint.plus, joint.minus)):
        return "one side mixes powers; split it into joints of one power"
    return None


def diagonal_powers(bucket: Bucket) -> tuple[float, float]:
    """The exponents k with which a diagonal s acts on the plus and the minus side (ReLU²: 1 and 2)."""
    joint = bucket.joints[0]
    return (joint.plus[0].power if joint.plus else 1.0), (joint.minus[0].power if joint.minus else 1.0)


class GradNorm(Objective):
    """J = ‖∇L‖²: steepest for SGD [ICLR24 section 3]; rotations leave it alone, so only groups that stretch can serve.

    `steps` geodesics per ascent: with one, `gram_difference` in one pass is all that is computed.
    """

    name = "grad_norm"
    closed_form = ("descend",)

    def __init__(self, steps: int = 1) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}; 1 is the default")
        self.steps = steps

    def unusable(self, joint: Joint) -> str | None:
        if not joint.group.holds_stretches:
            return f"{joint.group} leaves the gradient norm as it is"
        return mixed_powers(joint)

    def reads(self, bucket: Bucket, descend: bool) -> tuple[tuple[str, str], ...]:
        if bucket.group.form == "diagonal":
            return (("squares", "gradients"),)
        return (("grams" if descend or self.steps > 1 else "difference", "gradients"),)

    def decide(self, index: int, bucket: Bucket, sums: Sequence[Tensor], move: Move) -> tuple[Element, Tensor] | None:
        if bucket.group.form == "diagonal":
            k_plus, k_minus = diagonal_powers(bucket)
            a, b = sums
            t = diagonal_extremum(a, 2 * k_plus, b, 2 * k_minus, move.radius, move.descend)
            return Element("diagonal", t.exp()), t.abs().amax()
        if move.descend:
            gram_plus, gram_minus = sums
            return geodesic_descent(bucket.group, gram_plus, gram_minus, move.radius, move.max_condition)
        if self.steps > 1:
            gram_plus, gram_minus = sums
            return trust_region_ascent(bucket.group, gram_plus, gram_minus, move.radius, self.steps)
        algebra = lie_step(bucket.group, sums[0], move.radius)
        assert isinstance(bucket.group, DenseGroup)
        return exponential(algebra), bucket.group.factor_norm(algebra)

    def value(self, move: Move) -> Tensor:
        norms = torch._foreach_norm(list(move.gradients.values()))
        return torch.stack([norm.double() for norm in norms]).square().sum()


class GradL1(Objective):
    """J = ‖∇L‖₁, the dual norm of sign-like optimizers and, roughly, of Adam; rotations matter to it.

    Diagonals in closed form. Dense groups: the longest of `trials` halvings of the radius that improves, along the
    Lie-algebra gradient sign(G₋)G₋ᵀ − G₊sign(G₊)ᵀ; a head where none improves stays where it is. The trials read whole
    tensors: where they lie on many ranks, dense joints are refused.
    """

    name = "grad_l1"

    def __init__(self, trials: int = 4) -> None:
        if trials < 1:
            raise ValueError(f"trials must be at least 1, got {trials}; 4 is the default")
        self.trials = trials

    def needs_whole(self, joint: Joint) -> str | None:
        return "its line search reads whole tensors" if joint.group.form == "dense" else None

    def unusable(self, joint: Joint) -> str | None:
        if joint.group.form != "dense" and not joint.group.holds_stretches:
            return f"a {'permutation' if joint.group.form == 'permutation' else 'sign'} leaves the l1 norm as it is"
        if joint.group.form == "dense" and not (joint.plus and joint.minus):
            return "the line search needs tensors on both sides of the joint"
        return mixed_powers(joint)

    def reads(self, bucket: Bucket, descend: bool) -> tuple[tuple[str, str], ...]:
        return (("l1", "gradients"),) if bucket.group.form == "diagonal" else ()

    def decide(self, index: int, bucket: Bucket, sums: Sequence[Tensor], move: Move) -> tuple[Element, Tensor] | None:
        if bucket.group.form != "diagonal":
            return self._search(bucket, move)
        k_plus, k_minus = diagonal_powers(bucket)
        alpha, beta = sums
        t = diagonal_extremum(alpha, k_plus, beta, k_minus, move.radius, move.descend)
        return Element("diagonal", t.exp()), t.abs().amax()

    def _search(self, bucket: Bucket, move: Move) -> tuple[Element, Tensor]:
        plus, minus, joints = bucket.plus(move.gradients), bucket.minus(move.gradients), len(bucket.joints)
        assert isinstance(bucket.group, DenseGroup)
        wide_plus, wide_minus = _side_by_side(plus, joints), _side_by_side(minus, joints)
        lie_gradient = wide_minus.sign() @ wide_minus.mT - wide_plus @ wide_plus.sign().mT
        direction = lie_step(bucket.group, lie_gradient, move.radius, -1.0 if move.descend else 1.0)
        start = _l1(wide_plus) + _l1(wide_minus)
        chosen, settled = torch.zeros_like(direction), torch.zeros_like(start, dtype=torch.bool)
        for halvings in range(self.trials):
            algebra = direction * 0.5**halvings
            trial = exponential(algebra)
            assert trial.g_inverse_t is not None
            value = _l1(trial.g_inverse_t @ wide_plus) + _l1(trial.g @ wide_minus)
            improved = ~settled & (value < start if move.descend else value > start)
            # one trial settles nearly every bucket, and the others would cost a pass over the gradients each
            if bool(improved.all()):
                return trial, bucket.group.factor_norm(algebra)
            chosen, settled = torch.where(improved[:, None, None], algebra, chosen), settled | improved
            if bool(settled.all()):
                break
        return exponential(chosen), bucket.group.factor_norm(chosen)

    def value(self, move: Move) -> Tensor:
        norms = torch._foreach_norm(list(move.gradients.values()), 1)
        return torch.stack([norm.double() for norm in norms]).sum()


def _l1(wide: Tensor) -> Tensor:
    """The l1 norm of every head, (joints·heads,), without a copy of absolute values."""
    norms: Tensor = torch.linalg.vector_norm(wide, 1, (1, 2))
    return norms


def _side_by_side(views: list[Tensor], joints: int) -> Tensor:
    """(joints·heads, h, n): each joint's views next to each other."""
    run = len(views) // joints
    return torch.cat([torch.cat([v.flatten(2) for v in views[i : i + run]], 2) for i in range(0, len(views), run)])
