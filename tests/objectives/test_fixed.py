"""Fixed moves exactly the named joints by exactly the given elements, and checks them before anything moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import teleport_fast as tf
from teleport_fast import objectives


def test_a_teleport_by_given_elements_is_apply_(trial: Any) -> None:
    elements = trial.symmetries.random(0.3)
    optimizer = trial.sgd()
    teleporter = tf.attach(optimizer, trial.symmetries, objectives.Fixed(elements), tf.Once())
    trial.backward(0)
    expected = {name: p.detach().clone() for name, p in trial.model.named_parameters()}
    optimizer.step()
    moved = {name: p.detach().clone() for name, p in trial.model.named_parameters()}
    trial.model.load_state_dict(expected, strict=False)
    trial.symmetries.apply_(trial.model, {j.name: elements[j.name] for b in teleporter.plan.buckets for j in b.joints})
    for name, parameter in trial.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), moved[name], rtol=1e-12, atol=1e-12)
    assert teleporter.history[0].joints == len(trial.symmetries)
    assert math.isnan(teleporter.history[0].radius_used)


def test_joints_without_an_element_stay(trial_of: Callable[..., Any]) -> None:
    trial = trial_of("relu2")
    name = "blocks.1.attention.value-output"
    optimizer = trial.sgd()
    fixed = objectives.Fixed({name: trial.symmetries.random(0.3)[name]})
    teleporter = tf.attach(optimizer, trial.symmetries, fixed, tf.Once())
    before = {n: p.detach().clone() for n, p in trial.model.named_parameters()}
    trial.backward(0)
    optimizer.step()
    moved = {n for n, p in trial.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trial.symmetries[name].parameters())
    assert teleporter.plan.left_out["residual"] == "no element was given for this joint"


@pytest.mark.parametrize(
    ("name", "g", "message"),
    [
        ("nowhere", torch.eye(16), "elements name the joint 'nowhere', which was not found; see symmetries.explain"),
        ("residual", torch.eye(5), r"joint 'residual' must have shape \(1, 16, 16\) for O\(16\), got \(5, 5\)"),
        ("residual", 2 * torch.eye(16), "element of joint 'residual' must be orthogonal"),
        ("residual", torch.full((16, 16), math.nan), "element of joint 'residual' has a non-finite entry"),
        ("blocks.0.attention.value-output", torch.zeros(2, 8, 8), "is singular; pass an invertible element"),
        ("blocks.0.mlp.up-down", -torch.ones(1, 24), "must have positive entries for positive diagonal.24., got -1.0"),
        ("blocks.0.mlp.neurons", torch.zeros(1, 24, dtype=torch.int64), "must be an int64 permutation of 0..23"),
    ],
)
def test_an_element_outside_its_group_is_refused_at_attach(
    trial_of: Callable[..., Any], name: str, g: torch.Tensor, message: str
) -> None:
    trial = trial_of("relu2")
    optimizer = trial.sgd()
    good = {"blocks.1.mlp.up-down": torch.full((1, 24), 2.0)}
    with pytest.raises(ValueError, match=message):
        tf.attach(optimizer, trial.symmetries, objectives.Fixed({**good, name: g}), tf.Once())
    assert "teleport_step" not in optimizer.param_groups[0]
