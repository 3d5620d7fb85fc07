"""Gradient norms go the right way on every joint, stay in their ball, and record what a fresh backward finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.symmetry import GeneralLinear, Permutation, PositiveDiagonal

NORMS: dict[str, Callable[[Any], float]] = {
    "grad_norm": lambda trial: float(sum(g.square().sum() for g in trial.gradients().values())),
    "grad_l1": lambda trial: float(sum(g.abs().sum() for g in trial.gradients().values())),
}
names = pytest.mark.parametrize("name", NORMS)
directions = pytest.mark.parametrize("direction", ["ascend", "descend"])


@names
@directions
def test_every_teleport_moves_its_value_the_right_way_within_the_radius(
    trial: Any, name: str, direction: str
) -> None:
    optimizer = trial.sgd(lr=0.02)
    teleporter = tf.attach(
        optimizer, trial.symmetries, name, tf.Every(1), radius=0.3, frame="return", direction=direction
    )
    for step in range(4):
        trial.backward(step)
        optimizer.step()
    assert len(teleporter.history) == 3
    for record in teleporter.history:
        change = record.objective_after - record.objective_before
        assert change > 1e-3 * record.objective_before if direction == "ascend" else change < 0
        assert 0 < record.radius_used <= 0.3 * (1 + 1e-6)


@names
@directions
def test_the_record_holds_what_a_fresh_backward_finds_at_both_points(trial: Any, name: str, direction: str) -> None:
    optimizer = trial.sgd()
    teleporter = tf.attach(optimizer, trial.symmetries, name, tf.Once(), direction=direction)
    trial.backward(0)
    before = NORMS[name](trial)
    optimizer.step()
    trial.backward(0)
    (record,) = teleporter.history
    assert record.objective_before == pytest.approx(before, rel=1e-9)
    assert record.objective_after == pytest.approx(NORMS[name](trial), rel=1e-9)
    assert record.objective_after != pytest.approx(before, rel=1e-3)


@names
@directions
def test_a_larger_radius_reaches_further(trial_of: Callable[..., Any], name: str, direction: str) -> None:
    reached = []
    for radius in (0.01, 0.1, 0.4):
        trial = trial_of("relu2")
        optimizer = trial.sgd()
        teleporter = tf.attach(optimizer, trial.symmetries, name, tf.Once(), radius=radius, direction=direction)
        trial.backward(0)
        optimizer.step()
        reached.append(teleporter.history[0].objective_after)
    assert reached == sorted(reached, reverse=direction == "descend")


def test_several_geodesics_use_the_radius_of_one(trial_of: Callable[..., Any]) -> None:
    trial = trial_of("relu2")
    optimizer = trial.sgd()
    teleporter = tf.attach(optimizer, trial.symmetries, objectives.GradNorm(steps=5), tf.Once(), radius=0.3)
    trial.backward(0)
    optimizer.step()
    (record,) = teleporter.history
    assert record.objective_after > record.objective_before
    assert record.radius_used == pytest.approx(0.3)


def test_an_unbounded_descent_reaches_the_minimum_of_every_joint_at_once(trial_of: Callable[..., Any]) -> None:
    """Full-rank Grams: at the minimum S₊ = S₋ on dense joints, so a second descent finds nothing to do."""
    trial = trial_of("swiglu-rotary-grouped")
    optimizer = trial.sgd()
    teleporter = tf.attach(
        optimizer, trial.symmetries, "grad_norm", tf.At(0, 1), radius=float("inf"), direction="descend"
    )
    for _ in range(2):
        trial.backward(0)
        optimizer.step()
    first, second = teleporter.history
    assert first.objective_after < first.objective_before
    assert second.objective_after == pytest.approx(second.objective_before, rel=1e-9)
    assert first.radius_used > 0.1
    assert second.radius_used < 1e-6


def test_a_head_where_no_trial_of_the_line_search_helps_stays(trial_of: Callable[..., Any]) -> None:
    """Turns of length 3 along the line soon make the l1 norm worse: from then on every weight stays, bit for bit."""
    trial = trial_of("relu2")
    dense = trial.symmetries.select(lambda joint: joint.kind == "residual")
    optimizer = trial.sgd()
    teleporter = tf.attach(optimizer, dense, objectives.GradL1(trials=1), tf.Every(1), radius=3.0, direction="descend")
    unchanged = 0
    for _ in range(6):
        trial.backward(0)
        before = [p.detach().clone() for p in trial.model.parameters()]
        optimizer.step()
        unchanged += all(map(torch.equal, before, trial.model.parameters()))
    values = [record.objective_after for record in teleporter.history]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))
    assert unchanged >= 2
    assert teleporter.history[-1].radius_used == 0


def two_layers(group: tf.symmetry.Group, plus: tuple[tf.View, ...], minus: tuple[tf.View, ...]) -> Any:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    joint = tf.Joint("joint", "test", group, 1, 4, plus, minus)
    return model, tf.Symmetries((joint,), model=model)


UP, DOWN = tf.View("0.weight", 0, 1, 4), tf.View("1.weight", 1, 1, 4)


@names
@directions
def test_a_joint_without_a_consumer_goes_to_the_end_of_its_ball(name: str, direction: str) -> None:
    """J(t) = a e^{−pt} alone, as for weights in front of a batch norm: no minimum, so the radius decides."""
    model, symmetries = two_layers(PositiveDiagonal(4), (UP,), ())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tf.attach(optimizer, symmetries, name, tf.Once(), radius=0.25, direction=direction)
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    factor = torch.tensor(-0.25 if direction == "ascend" else 0.25, dtype=torch.float64).exp()
    torch.testing.assert_close(model[0].weight.detach(), before * factor)


def test_joints_that_cannot_serve_are_left_out_with_a_reason() -> None:
    squared = tf.View("1.weight", 1, 1, 4, power=2.0)
    cases: list[tuple[objectives.Objective, Any, tuple[tf.View, ...], tuple[tf.View, ...], str]] = [
        (objectives.GradNorm(), tf.symmetry.Orthogonal(4), (UP,), (DOWN,), "leaves the gradient norm as it is"),
        (objectives.GradNorm(), Permutation(4), (UP,), (DOWN,), "leaves the gradient norm as it is"),
        (objectives.GradL1(), Permutation(4), (UP,), (DOWN,), "a permutation leaves the l1 norm as it is"),
        (objectives.GradL1(), GeneralLinear(4), (UP,), (), "tensors on both sides"),
        (objectives.GradNorm(), PositiveDiagonal(4), (UP,), (DOWN, squared), "mixes powers"),
        (objectives.GradL1(), PositiveDiagonal(4), (UP,), (DOWN, squared), "mixes powers"),
    ]
    for objective, group, plus, minus, reason in cases:
        _, symmetries = two_layers(group, plus, minus)
        assert reason in str(objective.unusable(symmetries["joint"]))
    _, symmetries = two_layers(GeneralLinear(4), (UP,), (DOWN,))
    assert objectives.GradNorm().unusable(symmetries["joint"]) is None
    assert objectives.GradL1().unusable(symmetries["joint"]) is None


def test_the_l1_line_search_sees_rotations_that_the_frobenius_norm_does_not(trial_of: Callable[..., Any]) -> None:
    trial = trial_of("relu2")
    residual = trial.symmetries.select(lambda joint: joint.kind == "residual")
    optimizer = trial.sgd()
    tf.attach(optimizer, residual, "grad_l1", tf.Once())
    trial.backward(0)
    frobenius, l1 = NORMS["grad_norm"](trial), NORMS["grad_l1"](trial)
    optimizer.step()
    assert NORMS["grad_norm"](trial) == pytest.approx(frobenius, rel=1e-12)
    assert NORMS["grad_l1"](trial) > 1.001 * l1


def test_row_sums_and_grams_of_an_absent_side_are_zero() -> None:
    from teleport_fast.objectives.sums import grams, row_sums

    rows: list[Tensor] = [torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3)]
    gram_plus, gram_minus = grams(rows, [], joints=2)
    assert gram_plus.shape == gram_minus.shape == (2, 2, 2)
    assert float(gram_plus.sum()) == 24
    assert float(gram_minus.abs().sum()) == 0
    above, below = row_sums([], rows, joints=2)
    assert float(above[0].abs().sum() + above[1].abs().sum()) == 0
    assert torch.equal(below[0], torch.full((2, 2), 3.0))
