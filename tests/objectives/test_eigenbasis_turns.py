"""What a turn may be: the best angle per rotary plane, the ones vector kept, and the options of the covariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.objectives import eigenbasis
from teleport_fast.symmetry import GeneralLinear, Joint, Orthogonal, Rotary
from teleport_fast.symmetry.groups import DenseGroup

ROTARIES = [Rotary(8, rotary=8, layout="half"), Rotary(8, rotary=8, layout="interleaved"), Rotary(9, rotary=4, layout="half")]
every_rotary = pytest.mark.parametrize("group", ROTARIES, ids=str)


def covariances(count: int, width: int) -> Tensor:
    noise = torch.randn(count, width, width, dtype=torch.float64)
    return noise @ noise.mT


def planes(group: Rotary) -> list[tuple[int, int]]:
    half = group.rotary // 2
    return [(i, i + half) if group.layout == "half" else (2 * i, 2 * i + 1) for i in range(half)]


def embedding(group: Rotary, position: int) -> Tensor:
    """The rotary embedding itself, a rotation of every plane by an angle of its own."""
    rope = torch.eye(group.width, dtype=torch.float64)
    for index, (i, j) in enumerate(planes(group)):
        angle = position * 10_000 ** (-2 * index / group.rotary)
        cos, sin = math.cos(angle), math.sin(angle)
        rope[[i, i, j, j], [i, j, i, j]] = torch.tensor([cos, -sin, sin, cos], dtype=torch.float64)
    return rope


def crossed(group: Rotary, turned: Tensor) -> float:
    """What is left between the two axes of a plane, as a share of the plane's own size."""
    found = [turned[:, i, j].abs() / (turned[:, i, i] + turned[:, j, j]) for i, j in planes(group)]
    return float(torch.stack(found).max())


@every_rotary
def test_one_turn_diagonalises_every_plane_and_commutes_with_the_embedding(group: Rotary) -> None:
    covariance = covariances(5, group.width)
    q = group.turn_to_eigenbasis(covariance)
    assert crossed(group, q.mT @ covariance @ q) < 1e-14
    torch.testing.assert_close(q @ q.mT, torch.eye(group.width, dtype=torch.float64).expand_as(q))
    iterated, free = group.orthogonal_factor(covariance), torch.linalg.qr(covariance).Q
    assert crossed(group, iterated.mT @ covariance @ iterated) > 1e-3
    for position in (1, 7):
        rope = embedding(group, position)
        torch.testing.assert_close(q @ rope, rope @ q)
        assert float((free @ rope - rope @ free).norm()) > 1e-2


@every_rotary
def test_of_the_angles_that_diagonalise_a_plane_the_smallest_is_taken(group: Rotary) -> None:
    q = group.turn_to_eigenbasis(covariances(50, group.width))
    for i, j in planes(group):
        assert float(torch.atan2(q[:, j, i], q[:, i, i]).abs().max()) <= math.pi / 4
        torch.testing.assert_close(q[:, i, i], q[:, j, j])


def test_a_plane_that_is_the_same_in_every_basis_stays() -> None:
    group = Rotary(4, rotary=4)
    assert torch.equal(group.turn_to_eigenbasis(3 * torch.eye(4)[None]), torch.eye(4)[None])


@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_a_turn_beside_the_ones_vector_keeps_it_and_is_the_iteration_on_its_complement(width: int) -> None:
    group = Orthogonal(width, fixes_ones=True)
    covariance = covariances(3, width)
    q, ones = group.turn_to_eigenbasis(covariance), torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(q @ ones, ones.expand(3, -1))
    torch.testing.assert_close(q @ q.mT, torch.eye(width, dtype=torch.float64).expand_as(q))
    group.check(q[0], 1, "joint")
    if width > 2:
        # the basis of the complement that the first axis leaves when it goes to the ones vector
        u = ones / width**0.5
        u[0] -= 1
        others = (torch.eye(width, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u))[:, 1:]
        inner, r = torch.linalg.qr(others.mT @ covariance @ others)
        inner = inner * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
        torch.testing.assert_close(q @ others, others @ inner)
        free = Orthogonal(width).turn_to_eigenbasis(covariance)
        assert float((free @ ones - ones).norm()) > 1e-2


def wider(joint: Joint, group: DenseGroup) -> Joint:
    return Joint(joint.name, joint.kind, group, joint.heads, joint.width, joint.plus, joint.minus)


WRONG: dict[str, tuple[str, str, Callable[[Joint], DenseGroup]]] = {
    "a turn of a LayerNorm's stream that moves the ones vector": ("layernorm", "residual", lambda j: Orthogonal(j.width)),
    "the same where gains are folded and biases turn along": (
        "folded-layernorm-bias",
        "residual",
        lambda j: Orthogonal(j.width),
    ),
    "a whole turn of queries and keys under a rotary embedding": (
        "swiglu-rotary-grouped",
        "query-key",
        lambda j: GeneralLinear(j.width),
    ),
    "planes of the other layout": (
        "rotary-fused-tied",
        "query-key",
        lambda j: Rotary(j.width, rotary=j.width, layout="interleaved"),
    ),
}


@pytest.mark.parametrize(("variant", "kind", "change"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_turn_outside_of_the_joints_group_moves_the_function(
    variant: str, kind: str, change: Callable[[Joint], DenseGroup], dtype: torch.dtype, trial_of: Callable[..., Any]
) -> None:
    """The turn that the objective makes, and the one it would make in the larger group."""
    moved = {}
    for wrong in (False, True):
        trial = trial_of(variant, dtype)
        joints = [j for j in trial.symmetries if kind in j.kind]
        if wrong:
            joints = [wider(joint, change(joint)) for joint in joints]
        optimizer = trial.adamw()
        teleporter = tf.attach(optimizer, tf.Symmetries(tuple(joints), model=trial.model), "eigenbasis", tf.Every(2))
        with trial.deviations(teleporter) as deviations:
            for step in range(5):
                trial.backward(step)
                optimizer.step()
        assert min(record.radius_used for record in teleporter.history) > 0.1
        moved[wrong] = max(deviations) if not wrong else min(deviations)
    assert moved[False] <= (1e-12 if dtype == torch.float64 else 1e-4)
    assert moved[True] > 1e-3


def test_centred_writers_change_no_function_and_free_no_further_turn(trial_of: Callable[..., Any]) -> None:
    """Under LayerNorm a writer's mean is not seen, but a stream without one still may not leave the ones vector."""
    trial = trial_of("layernorm")
    joint, before = trial.symmetries["residual"], trial.logits()
    tensors = dict(trial.model.named_parameters())
    with torch.no_grad():
        for view in joint.plus:
            rows = view.of(tensors[view.parameter])
            rows.sub_(rows.mean(1, keepdim=True))
    assert float((trial.logits() - before).norm() / before.norm()) < 1e-13
    free = replace(wider(joint, Orthogonal(joint.width)), name="free")
    symmetries = tf.Symmetries((joint, free), model=trial.model)
    symmetries.apply_(trial.model, {"residual": joint.group.random(1, 1.0, dtype=torch.float64)})
    assert float((trial.logits() - before).norm() / before.norm()) < 1e-13
    symmetries.apply_(trial.model, {"free": Orthogonal(joint.width).random(1, 1.0, dtype=torch.float64)})
    assert float((trial.logits() - before).norm() / before.norm()) > 1e-3


def turned_by(trial: Any, steps: int = 5, every: int = 2, second_moments: str = "keep", **options: Any) -> Any:
    objective = objectives.Eigenbasis(**options)
    optimizer = trial.adamw()
    teleporter = tf.attach(optimizer, trial.symmetries, objective, tf.Every(every), second_moments=second_moments)
    with trial.deviations(teleporter) as deviations:
        for step in range(steps):
            trial.backward(step)
            optimizer.step()
    assert len(deviations) == (steps - 1) // every
    return objective, teleporter, max(deviations)


OPTIONS: dict[str, dict[str, Any]] = {
    "decay": {"decay": 0.5},
    "joint": {"normalise": "joint"},
    "none": {"normalise": "none"},
    "turns": {"takes": "turns"},
    "parts": {"parts": 3},
    "iterations": {"iterations": 4},
    "reset": {"second_moments": "reset"},
    "project": {"second_moments": "project"},
}


def test_every_option_turns_exactly_and_to_a_basis_of_its_own(
    trial_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigenbasis, "LEAST_PART", 5)
    weights = {}
    for name, options in {"default": {}, **OPTIONS}.items():
        trial = trial_of("swiglu-rotary-grouped")
        _, _, deviation = turned_by(trial, **options)
        assert deviation < 1e-12, name
        weights[name] = trial.model.blocks[0].attention.q.weight.detach()
    names = list(weights)
    for i, first in enumerate(names):
        for second in names[:i]:
            assert float((weights[first] - weights[second]).norm()) > 1e-6, (first, second)


def test_taken_at_turns_alone_the_covariance_is_that_of_the_turns_gradients(trial_of: Callable[..., Any]) -> None:
    trial = trial_of("relu2")
    objective, teleporter, _ = turned_by(trial, steps=3, every=2, decay=0.0, takes="turns")
    other = trial_of("relu2")
    plain = other.adamw()
    for step in range(3):
        other.backward(step)
        if step < 2:
            plain.step()
    gradients = other.gradients()
    for index, bucket in enumerate(teleporter.plan.buckets):
        expected = objectives.Eigenbasis(decay=0.0)
        expected.observe(index, bucket, gradients)
        q = bucket.group.turn_to_eigenbasis(expected.covariances[index])
        torch.testing.assert_close(objective.covariances[index], q.mT @ expected.covariances[index] @ q)


def test_parts_of_the_columns_are_taken_in_turns_and_a_resumed_run_goes_on_with_the_next(
    trial_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigenbasis, "LEAST_PART", 5)
    trial = trial_of("fused-qkv-bias")
    trial.backward(0)
    gradients = trial.gradients()
    bucket = next(b for b in tf.attach(trial.sgd(), trial.symmetries, "eigenbasis").plan.buckets if b.width == 16)
    views = [view.of(gradients[view.parameter]) for view in bucket.joints[0].views() if view.counts]
    assert all(view.shape[0] == 1 and 1 in view.shape[2:] for view in views)
    kinds = {(_columns_apart(view), min(3, view[0, 0].numel() // 5)) for view in views}
    assert {(True, 3), (False, 3)} <= kinds, kinds  # both ways to take a part occur
    objective, expected = objectives.Eigenbasis(decay=0.5, parts=3), torch.zeros(16, 16, dtype=torch.float64)
    for part in (0, 1, 2, 0):
        objective.observe(0, bucket, gradients)
        resumed = objectives.Eigenbasis(decay=0.5, parts=3)
        resumed.load_state_dict(objective.state_dict())
        objective = resumed
        expected *= 0.5
        for view in views:
            rows = view.flatten(2)[0]
            n = rows.shape[1]
            parts = max(1, min(3, n // 5))
            at = part % parts
            some = rows[:, at::parts] if _columns_apart(view) else rows[:, n * at // parts : n * (at + 1) // parts]
            expected += 0.5 * some @ some.T / some.square().sum()
        torch.testing.assert_close(objective.covariances[0][0], expected)
    whole = objectives.Eigenbasis(decay=0.5, parts=1)
    for _ in range(4):
        whole.observe(0, bucket, gradients)
    assert float((whole.covariances[0][0] - expected).norm() / expected.norm()) > 1e-2


def _columns_apart(view: Tensor) -> bool:
    return max(zip(view.shape[2:], view.stride()[2:], strict=True))[1] != 1


def test_iterations_in_one_turn_are_as_many_turns(trial_of: Callable[..., Any]) -> None:
    trial = trial_of("relu2")
    gradients = {}
    trial.backward(0)
    gradients = trial.gradients()
    plan = tf.attach(trial.sgd(), trial.symmetries, "eigenbasis").plan
    found = []
    for iterations, turns in ((3, 1), (1, 3)):
        objective = objectives.Eigenbasis(iterations=iterations)
        total: Tensor | None = None
        objective.observe(0, plan.buckets[0], gradients)
        for _ in range(turns):
            move = objectives.Move(gradients, gradients, 0.5, False, torch.Generator())
            element, _ = objective.element(0, plan.buckets[0], move) or (None, None)
            assert element is not None
            total = element.g if total is None else element.g @ total
        assert total is not None
        found.append(total)
    torch.testing.assert_close(found[0], found[1])


def test_directions_that_no_gradient_has_seen_stay() -> None:
    """A covariance of rank one turns its own direction to the first axis; rounding does not choose the others."""
    objective = objectives.Eigenbasis()
    view = tf.View("w", 0, 1, 6)
    bucket = tf.symmetry.bucket.Bucket((Joint("joint", "test", Orthogonal(6), 1, 6, (view,), ()),))
    u = torch.tensor([0.0, 0.0, 1.0, 2.0, 0.0, 0.0])
    objective.covariances[0] = torch.outer(u, u)[None].clone()
    like = {"w": torch.zeros(6, 1)}
    element, _ = objective.element(0, bucket, objectives.Move(like, {}, 0.5, False, torch.Generator())) or (None, None)
    assert element is not None
    unseen = [0, 1, 4, 5]
    torch.testing.assert_close(element.g[0][unseen][:, unseen], torch.eye(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0; 0.95"),
        ({"normalise": "all"}, "normalise must be one of tensor, joint, none, got 'all'; 'tensor'"),
        ({"takes": "none"}, "takes must be one of steps, turns, got 'none'; 'steps'"),
        ({"iterations": 0}, "iterations must be an integer of at least 1, got 0; 1"),
        ({"parts": 1.5}, "parts must be an integer of at least 1, got 1.5; 4"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objectives.Eigenbasis(**options)
