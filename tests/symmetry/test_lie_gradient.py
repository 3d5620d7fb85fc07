"""2⟨S₋ − S₊, M⟩ is the slope of ‖∇L(exp(tM)·w)‖², against central differences, for every kind of joint on every GPT."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teleport_fast.ops import gram_difference
from teleport_fast.search import exponential
from teleport_fast.symmetry import DenseGroup, Joint, Orthogonal
from teleport_fast.symmetry.bucket import PARAMETER, Bucket, Element

if TYPE_CHECKING:
    from tests.symmetry.conftest import Trial

EVERY_KIND = {
    *("value-output", "query-key", "query-key-rotary", "up-down", "up-down-squared"),
    *("norm-readers", "residual"),
}


def sides(trial: Trial, joint: Joint) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient's plus and minus views: of a fused tensor, the joint's own entries only."""
    gradients = trial.gradients()
    return Bucket((joint,)).plus(gradients), Bucket((joint,)).minus(gradients)


def objective(plus: list[Tensor], minus: list[Tensor]) -> float:
    return sum(float(view.square().sum()) for view in (*plus, *minus))


def slope(joint: Joint, direction: Tensor, plus: list[Tensor], minus: list[Tensor]) -> float:
    """2⟨S₋ − S₊, M⟩; for a diagonal Σ (−2a + 2kb) m, where the readers see sᵏ."""
    if joint.group.form == "dense":
        return 2 * float((gram_difference(plus, minus)[0] * direction).sum())
    a, b = (sum(view.square().sum((2, 3)) for view in side) for side in (plus, minus))
    return float(((2 * joint.minus[0].power * b - 2 * a) * direction).sum())


def random_direction(joint: Joint) -> Tensor:
    if not isinstance(joint.group, DenseGroup):
        return torch.randn(joint.heads, joint.width, dtype=torch.float64)
    noise = torch.randn(joint.heads, joint.width, joint.width, dtype=torch.float64)
    return joint.group.scale_to(joint.group.project(noise), 1.0)


def central_difference(trial: Trial, joint: Joint, direction: Tensor, h: float = 1e-3) -> float:
    """Of fourth order: the error at h = 1e-3 is some 1e-11 of the slope."""
    start = {name: tensor.detach().clone() for name, tensor in trial.tensors.items()}

    def along(t: float) -> float:
        dense = joint.group.form == "dense"
        element = exponential(t * direction) if dense else Element("diagonal", (t * direction).exp())
        Bucket((joint,)).move_(element, [(PARAMETER, trial.tensors)])
        value = objective(*sides(trial, joint))
        trial.model.load_state_dict(start, strict=False)
        return value

    return (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)


def continuous(trial: Trial) -> list[Joint]:
    """One layer's joints that have a Lie algebra."""
    return [j for j in trial.symmetries if j.group.dim and not j.name.startswith("blocks.1")]


def test_the_lie_gradient_is_the_slope_of_the_gradient_norm(trial: Trial) -> None:
    for joint in continuous(trial):
        plus, minus = sides(trial, joint)
        direction, size = random_direction(joint), objective(plus, minus)
        measured, claimed = central_difference(trial, joint, direction), slope(joint, direction, plus, minus)
        if isinstance(joint.group, Orthogonal):
            assert abs(claimed) <= 1e-12 * size
            assert abs(measured) <= 1e-9 * size, "a rotation leaves the gradient norm alone"
            continue
        assert abs(claimed - measured) <= 1e-6 * abs(measured), joint.name
        assert abs(measured) > 1e-3 * size, f"{joint.name}: a flat direction would prove nothing"
        assert abs(slope(joint, direction, minus, plus) - measured) > 1e-3 * abs(measured), "sides exchanged"


def test_the_variants_have_every_kind_of_joint(trial_of: Callable[..., Trial]) -> None:
    names = ("relu2", "relu-layernorm-bias", "rotary-bias", "gains")
    assert {joint.kind for name in names for joint in continuous(trial_of(name))} == EVERY_KIND
