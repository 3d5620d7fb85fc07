"""Balance brings producers and consumers to one scale in one move, and finds nothing to do the second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.symmetry import Orthogonal, PositiveDiagonal

BARE = ["relu2", "swiglu-rotary-grouped", "layernorm", "fused-qkv-bias"]


def sides(trial: Any, joint: tf.Joint) -> tuple[Tensor, Tensor]:
    """A₊ and A₋, (heads, h, n) each, all views side by side."""
    tensors = {name: p.detach() for name, p in trial.model.named_parameters()}
    plus, minus = ([v.of(tensors[v.parameter]).flatten(2) for v in views] for views in (joint.plus, joint.minus))
    return torch.cat(plus, 2), torch.cat(minus, 2)


def squared_norm(trial: Any) -> float:
    served = {n for j in trial.symmetries if j.group.holds_stretches for n in j.parameters()}
    return float(sum(p.detach().square().sum() for n, p in trial.model.named_parameters() if n in served))


def balanced(trial: Any, objective: str | objectives.Objective = "balance", **options: Any) -> tf.Teleporter:
    optimizer = trial.sgd()
    teleporter = tf.attach(optimizer, trial.symmetries, objective, **{"schedule": tf.Once(), **options})
    trial.backward(0)
    optimizer.step()
    return teleporter


@pytest.mark.parametrize("variant", BARE)
def test_one_move_makes_both_sides_of_every_joint_equal(trial_of: Callable[..., Any], variant: str) -> None:
    """Diagonals: row norms (k times the consumer's for degree k). GL: A₊A₊ᵀ = A₋A₋ᵀ. Rotary: their projections."""
    trial = trial_of(variant)

    def gaps() -> list[float]:
        found = []
        for joint in trial.symmetries:
            if not joint.group.holds_stretches:
                continue
            plus, minus = sides(trial, joint)
            if joint.group.form == "diagonal":
                above, below = plus.square().sum(2), minus.square().sum(2) * joint.minus[0].power
            else:
                above, below = joint.group.project(plus @ plus.mT), joint.group.project(minus @ minus.mT)
            found.append(float((above - below).norm() / above.norm()))
        return found

    assert min(gaps()) > 0.1
    balanced(trial)
    assert max(gaps()) < 1e-6


def test_the_function_stays_while_the_weights_shrink(trial: Any) -> None:
    logits, norm = trial.logits(), squared_norm(trial)
    (record,) = balanced(trial).history
    assert float((trial.logits() - logits).norm() / logits.norm()) < 1e-12
    assert record.objective_before == pytest.approx(norm, rel=1e-12)
    assert record.objective_after == pytest.approx(squared_norm(trial), rel=1e-12)
    assert record.objective_after < 0.99 * norm


@pytest.mark.parametrize("variant", BARE)
def test_a_balanced_model_stays_as_it_is(trial_of: Callable[..., Any], variant: str) -> None:
    trial = trial_of(variant)
    balanced(trial)
    before = [p.detach().clone() for p in trial.model.parameters()]
    (record,) = balanced(trial).history
    assert record.radius_used < 1e-6
    for old, new in zip(before, trial.model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("direction", ["ascend", "descend"])
def test_both_directions_move_the_right_way_within_the_radius(trial: Any, direction: str) -> None:
    (record,) = balanced(trial, radius=0.1, direction=direction).history
    assert (record.objective_after > record.objective_before) == (direction == "ascend")
    assert 0 < record.radius_used <= 0.1 * (1 + 1e-6)


def test_balance_does_not_look_at_the_gradient(trial_of: Callable[..., Any]) -> None:
    first, second = trial_of("relu2"), trial_of("relu2")
    balanced(first)
    optimizer = second.sgd()
    tf.attach(optimizer, second.symmetries, "balance", tf.Once())
    second.backward(7)
    optimizer.step()
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_joints_whose_norm_no_move_changes_are_left_out() -> None:
    view = tf.View("w", 0, 1, 4)
    turning = tf.Joint("turning", "test", Orthogonal(4), 1, 4, (view,), ())
    shifted = tf.Joint("shifted", "test", PositiveDiagonal(4), 1, 4, (tf.View("w", 0, 1, 4, shift=1.0),), (view,))
    plain = tf.Joint("plain", "test", PositiveDiagonal(4), 1, 4, (view,), ())
    assert objectives.Balance().unusable(turning) == "O(4) leaves the norm of the weights as it is"
    assert "shift" in str(objectives.Balance().unusable(shifted))
    assert objectives.Balance().unusable(plain) is None
