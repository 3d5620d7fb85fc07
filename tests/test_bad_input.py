"""What is wrong with an argument is said where it is given: the argument, its value, and the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.symmetry import GeneralLinear, Orthogonal

UP, DOWN = tf.View("0.weight", 0, 1, 4), tf.View("1.weight", 1, 1, 4)


def make_joint(plus: tf.View = UP, minus: tf.View = DOWN, group: tf.symmetry.Group | None = None) -> tf.Joint:
    return tf.Joint("joint", "test", group or GeneralLinear(4), 1, 4, (plus,), (minus,))


def setup(*joints: tf.Joint) -> tuple[nn.Sequential, torch.optim.Optimizer, tf.Symmetries]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    symmetries = tf.Symmetries(joints or (make_joint(),), model=model)
    return model, torch.optim.AdamW(model.parameters()), symmetries


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"objective": "grad-norm"},
        ValueError,
        "objective must be one of eigenbasis, random, grad_norm, grad_l1, balance, ratio, scaled or an Objective, got 'grad-norm'",
    ),
    ({"objective": 3}, ValueError, "objective must be one of eigenbasis, "),
    ({"objective": ["grad_norm"]}, ValueError, "or an Objective, got ['grad_norm']"),
    ({"objective": objectives.GradNorm}, ValueError, "or an Objective, got <class"),
    ({"direction": "up"}, ValueError, "direction must be one of ascend, descend for objective 'grad_norm', got 'up'"),
    (
        {"objective": "eigenbasis", "direction": "descend"},
        ValueError,
        "direction must be one of ascend for objective 'eigenbasis', got 'descend'",
    ),
    ({"frame": "back"}, ValueError, "frame must be one of stay, return, got 'back'"),
    ({"frame": None}, ValueError, "frame must be one of stay, return, got None"),
    ({"second_moments": "drop"}, ValueError, "second_moments must be one of keep, reset, project, got 'drop'"),
    (
        {"second_moments": "project", "frame": "return"},
        ValueError,
        "second_moments='project' cannot be undone on the way back; use 'keep' with frame='return'",
    ),
    ({"radius": -0.5}, ValueError, "radius must be positive, got -0.5; 0.5 is the usual choice"),
    ({"radius": 0}, ValueError, "radius must be positive, got 0; 0.5 is the usual choice"),
    ({"radius": math.nan}, ValueError, "radius must be positive, got nan; 0.5 is the usual choice"),
    ({"radius": math.inf}, ValueError, "radius must be finite for an ascent, got inf"),
    ({"radius": math.inf, "objective": "grad_l1", "direction": "descend"}, ValueError, "radius must be finite"),
    ({"radius": "0.5"}, TypeError, "radius must be a number or None, got '0.5'; 0.5 is the usual choice"),
    ({"radius": True}, TypeError, "radius must be a number or None, got True"),
    ({"schedule": 100}, TypeError, "schedule must be a Schedule, got int; pass tf.Every(100), or tf.When(a_function)"),
    ({"schedule": tf.Every}, TypeError, "schedule must be a Schedule, got ABCMeta; pass tf.Every(100)"),
    ({"on_teleport": "print"}, TypeError, "on_teleport must be callable or None, got 'print'; pass a function"),
    ({"seed": "1"}, TypeError, "seed must be an integer, got '1'; 0 is the default"),
    ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
@pytest.mark.parametrize("door", [tf.attach, tf.Teleport], ids=["attach", "Teleport"])
def test_a_wrong_argument_is_named_with_its_value_and_the_remedy(
    door: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    _, optimizer, symmetries = setup()
    keys = set(optimizer.param_groups[0])
    with pytest.raises(error, match=re.escape(message)):
        door(optimizer, symmetries, **arguments)
    assert set(optimizer.param_groups[0]) == keys
    assert not optimizer._optimizer_step_pre_hooks


def test_an_infinite_radius_is_right_where_the_optimum_is_known() -> None:
    for name in ("grad_norm", "balance"):
        _, optimizer, symmetries = setup()
        assert math.isinf(tf.attach(optimizer, symmetries, name, radius=math.inf, direction="descend").radius)


@pytest.mark.parametrize("wrong", [None, nn.Linear(2, 2), [nn.Parameter(torch.zeros(2))], torch.optim.AdamW])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    _, _, symmetries = setup()
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got \w+; pass AdamW"):
        tf.attach(wrong, symmetries)


def test_an_optimizer_that_evaluates_its_closure_again_is_refused() -> None:
    model, _, symmetries = setup()
    with pytest.raises(TypeError, match="LBFGS evaluates its closure several times a step and cannot be teleported"):
        tf.attach(torch.optim.LBFGS(model.parameters()), symmetries)


@pytest.mark.parametrize("wrong", [None, [], [make_joint()], {"joint": make_joint()}])
def test_what_are_no_symmetries_is_refused(wrong: Any) -> None:
    _, optimizer, _ = setup()
    with pytest.raises(TypeError, match=r"symmetries must be a Symmetries, got \w+; pass tf\.find_symmetries\(model\)"):
        tf.attach(optimizer, wrong)


def test_what_is_no_process_group_is_refused() -> None:
    _, optimizer, symmetries = setup()
    with pytest.raises(TypeError, match=r"group must be a ProcessGroup or None, got 'world'; torch.distributed.group.WORLD has all"):
        tf.attach(optimizer, symmetries, group="world")  # type: ignore[arg-type]


def test_a_parameter_that_is_not_in_the_optimizer_is_named_with_its_joint() -> None:
    model, _, symmetries = setup()
    optimizer = torch.optim.AdamW(model[0].parameters())
    message = (
        "parameter '1.weight' of joint 'joint' is not in the optimizer; "
        "give it to the optimizer, or leave the joint out with symmetries.select(...)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tf.attach(optimizer, symmetries)


@pytest.mark.parametrize(
    ("plus", "minus", "message"),
    [
        (
            tf.View("1.weight", 0, 1, 4),
            DOWN,
            "axis 0 of shape (2, 4) has 2 entries, but 1 heads of width 4 need 4; the joint's tensors disagree in size",
        ),
        (
            UP,
            tf.View("1.weight", 1, 1, 4, start=2),
            "axis 1 of shape (2, 4) has 4 entries, but 1 heads of width 4 need 6; the joint's tensors disagree in size",
        ),
        (UP, tf.View("1.bias", 1, 1, 4), "axis 1 does not exist in a tensor of shape (2,)"),
    ],
)
def test_a_joint_whose_tensors_disagree_in_size_is_named(plus: tf.View, minus: tf.View, message: str) -> None:
    _, optimizer, symmetries = setup(make_joint(plus, minus))
    with pytest.raises(ValueError, match=r"joint 'joint': view of '1\.\w+': " + re.escape(message)):
        tf.attach(optimizer, symmetries)


def test_symmetries_that_no_objective_can_use_are_listed_with_the_reasons() -> None:
    _, optimizer, symmetries = setup(make_joint(group=Orthogonal(4)))
    message = (
        "no joint can serve objective 'grad_norm' (joint: O(4) leaves the gradient norm as it is); "
        "pass another objective, or other symmetries: see symmetries.explain()"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tf.attach(optimizer, symmetries, "grad_norm")
    with pytest.raises(ValueError, match=r"no joint can serve objective 'grad_norm' \(there are no joints\)"):
        tf.attach(optimizer, tf.Symmetries(()), "grad_norm")


@pytest.mark.parametrize(
    ("g", "message"),
    [
        (torch.eye(3), "element of joint 'joint' must have shape (1, 4, 4) for GL(4), got (3, 3)"),
        (torch.ones(4), "element of joint 'joint' must have shape (1, 4, 4) for GL(4), got (4,)"),
        (torch.eye(4, dtype=torch.int64), "joint 'joint' must be a floating tensor for GL(4), got torch.int64"),
        (torch.full((4, 4), math.inf), "element of joint 'joint' has a non-finite entry; pass a finite invertible"),
        (torch.ones(4, 4), "element of joint 'joint' is singular; pass an invertible element"),
    ],
)
def test_an_element_that_is_not_in_the_group_is_refused_before_training_starts(g: torch.Tensor, message: str) -> None:
    _, optimizer, symmetries = setup()
    with pytest.raises(ValueError, match=re.escape(message)):
        tf.attach(optimizer, symmetries, objectives.Fixed({"joint": g}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.GradNorm(steps=0), "steps must be at least 1, got 0; 1 is the default"),
        (lambda: objectives.GradL1(trials=0), "trials must be at least 1, got 0; 4 is the default"),
        (lambda: objectives.Ratio(0.0), "ratio must be positive and finite, got 0.0; 16 is the default"),
        (lambda: objectives.Ratio(math.inf), "ratio must be positive and finite, got inf"),
        (lambda: objectives.Scaled(decay=1.0), "decay must be in [0, 1), got 1.0; 0.95 is the default"),
        (lambda: objectives.Scaled(ridge=0.0), "ridge must be positive, got 0.0; 1e-12 is the default"),
        (lambda: objectives.Eigenbasis(decay=1.0), "decay must be in [0, 1), got 1.0; 0.95 is the default"),
        (lambda: objectives.Eigenbasis(decay=-0.1), "decay must be in [0, 1), got -0.1"),
        (lambda: objectives.Eigenbasis(decay=math.nan), "decay must be in [0, 1), got nan"),
    ],
)
def test_an_objective_checks_its_own_numbers(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_attaching_again_after_a_refusal_works() -> None:
    model, optimizer, symmetries = setup()
    with pytest.raises(ValueError, match="radius must be positive"):
        tf.attach(optimizer, symmetries, radius=-1.0)
    teleporter = tf.attach(optimizer, symmetries, schedule=tf.Once())
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert len(teleporter.history) == 1
    assert optimizer.param_groups[0]["teleport_step"] == 1
