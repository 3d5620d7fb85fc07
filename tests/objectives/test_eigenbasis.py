"""Turning to the eigenbasis: the function stays, the covariance becomes diagonal; a random turn is the control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.symmetry import DenseGroup, GeneralLinear, Orthogonal, Rotary
from teleport_fast.symmetry.bucket import Bucket, Element

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-4}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)


def bucket_of(group: DenseGroup) -> Bucket:
    width = group.width
    view = tf.View("w", 0, 1, width)
    return Bucket((tf.Joint("joint", "test", group, 1, width, (view,), ()),))


def refresh(objective: objectives.Objective, bucket: Bucket, index: int = 0, seed: int = 0) -> Element:
    like = {"w": torch.zeros(bucket.width, 1, dtype=torch.float64)}
    move = objectives.Move(like, {}, 0.5, False, torch.Generator().manual_seed(seed))
    found = objective.element(index, bucket, move)
    assert found is not None
    return found[0]


def spread_covariance(width: int) -> Tensor:
    """Eigenvalues 1, 1/2, 1/4, … in a random basis."""
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    return (basis * 0.5 ** torch.arange(width)) @ basis.mT


def off_diagonal(covariance: Tensor) -> float:
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    return float((covariance - diagonal).norm() / covariance.norm())


@dtypes
@pytest.mark.parametrize("name", ["eigenbasis", "random"])
def test_no_turn_of_a_training_run_moves_the_function(
    trial_of: Callable[..., Any], found: dict[str, Any], name: str, dtype: torch.dtype
) -> None:
    for variant in found:
        trial = trial_of(variant, dtype)
        optimizer = trial.adamw()
        teleporter = tf.attach(optimizer, trial.symmetries, objective=name, schedule=tf.Every(2))
        with trial.deviations(teleporter) as deviations:
            for step in range(9):
                trial.backward(step)
                optimizer.step()
        assert len(deviations) == 4
        assert max(deviations) <= LIMITS[dtype], variant
        assert min(record.radius_used for record in teleporter.history) > 0.1, variant


def test_a_turn_that_forgets_one_tensor_moves_the_function(trial: Any) -> None:
    optimizer = trial.adamw()
    teleporter = tf.attach(optimizer, trial.symmetries, objective="eigenbasis", schedule=tf.Every(2))
    name, forgotten = next((n, p) for n, p in trial.model.named_parameters() if n.endswith("o.weight"))
    kept: list[Tensor] = []
    teleporter.before_move.append(lambda _: kept.append(forgotten.detach().clone()))
    with trial.deviations(teleporter) as deviations:
        teleporter.after_move.insert(0, lambda _: forgotten.data.copy_(kept[-1]))
        for step in range(3):
            trial.backward(step)
            optimizer.step()
    assert len(deviations) == 1
    assert deviations[0] > 1e-3, name


@pytest.mark.parametrize("group", [Orthogonal(6), GeneralLinear(6)], ids=str)
def test_repeated_turns_converge_to_the_eigenbasis_of_a_fixed_covariance(group: DenseGroup) -> None:
    objective, bucket = objectives.Eigenbasis(), bucket_of(group)
    covariance = spread_covariance(group.width)
    objective.covariances[0] = covariance[None].clone()
    for _ in range(60):
        refresh(objective, bucket)
    turned = objective.covariances[0][0]
    assert off_diagonal(turned) < 1e-12
    torch.testing.assert_close(turned.diagonal().sort().values, torch.linalg.eigvalsh(covariance))


def test_turns_that_fix_the_ones_vector_diagonalise_what_is_orthogonal_to_it() -> None:
    group = Orthogonal(7, fixes_ones=True)
    objective, bucket = objectives.Eigenbasis(), bucket_of(group)
    objective.covariances[0] = spread_covariance(7)[None]
    for _ in range(150):
        group.check(refresh(objective, bucket).g, 1, "joint")
    # the Householder reflection that takes the ones vector to the first axis, the basis in which the group turns
    u = torch.full((7,), 7**-0.5, dtype=torch.float64)
    u[0] -= 1
    reflect = torch.eye(7, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u)
    turned = reflect @ objective.covariances[0][0] @ reflect
    assert off_diagonal(turned[1:, 1:]) < 1e-10
    assert off_diagonal(turned) > 1e-2


def test_a_random_turn_is_as_large_but_does_not_diagonalise() -> None:
    covariance, bucket = spread_covariance(6), bucket_of(Orthogonal(6))
    random = objectives.RandomRotation()
    for seed in range(60):
        q = refresh(random, bucket, seed=seed).g[0].mT
        torch.testing.assert_close(q.mT @ q, torch.eye(6, dtype=torch.float64))
        covariance = q.mT @ covariance @ q
    assert off_diagonal(covariance) > 0.1


def test_under_a_rotary_embedding_every_plane_is_diagonalised_on_its_own() -> None:
    group = Rotary(6, rotary=4)
    objective, bucket = objectives.Eigenbasis(), bucket_of(group)
    objective.covariances[0] = spread_covariance(6)[None]
    for _ in range(200):
        element = refresh(objective, bucket)
        group.check(element.g, 1, "joint")
    turned = objective.covariances[0][0]
    for block in ([0, 2], [1, 3], [4, 5]):
        assert off_diagonal(turned[block][:, block]) < 1e-12
    assert off_diagonal(turned) > 1e-2


def test_under_layernorm_turns_keep_the_vector_of_ones(trial_of: Callable[..., Any]) -> None:
    trial = trial_of("layernorm")
    optimizer = trial.adamw()
    teleporter = tf.attach(optimizer, trial.symmetries, objective="eigenbasis", schedule=tf.Every(1))
    table = trial.model.token.weight
    means: list[Tensor] = []
    teleporter.before_move.append(lambda _: means.append(table.detach().mean(1)))
    teleporter.after_move.append(lambda _: means.append(table.detach().mean(1)))
    for step in range(3):
        trial.backward(step)
        optimizer.step()
    assert len(means) == 4
    for before, after in zip(means[::2], means[1::2], strict=True):
        torch.testing.assert_close(after, before, atol=1e-12, rtol=0)


def test_the_covariance_is_the_running_mean_of_normalised_gradient_grams(trial: Any) -> None:
    optimizer = trial.sgd()
    objective = objectives.Eigenbasis(decay=0.7)
    teleporter = tf.attach(optimizer, trial.symmetries, objective, schedule=tf.At())
    expected: dict[int, Tensor] = {}
    for step in range(3):
        trial.backward(step)
        optimizer.step()
        gradients = trial.gradients()
        for index, bucket in enumerate(teleporter.plan.buckets):
            grams = torch.zeros(len(bucket.joints), bucket.heads, bucket.width, bucket.width, dtype=torch.float64)
            for row, joint in enumerate(bucket.joints):
                for view in joint.views():
                    rows = view.of(gradients[view.parameter]).flatten(2)
                    if view.counts:
                        grams[row] += rows @ rows.mT / rows.square().sum()
            expected[index] = 0.7 * expected.get(index, 0.0) + 0.3 * grams.flatten(0, 1)
    assert objective.covariances.keys() == expected.keys()
    for index, covariance in objective.covariances.items():
        torch.testing.assert_close(covariance, expected[index])


def test_a_turn_takes_the_covariance_along(trial_of: Callable[..., Any]) -> None:
    """One batch over and over: the gradient's Gram in the new basis is the covariance that was turned."""
    trial = trial_of("relu2")
    optimizer = trial.sgd()
    objective = objectives.Eigenbasis(decay=0.0)
    tf.attach(optimizer, trial.symmetries, objective, schedule=tf.At(1))
    for _ in range(2):
        trial.backward(0)
        optimizer.step()
    turned = {index: covariance.clone() for index, covariance in objective.covariances.items()}
    trial.backward(0)
    optimizer.step()
    assert max(off_diagonal(covariance) for covariance in turned.values()) > 1e-3
    for index, covariance in objective.covariances.items():
        torch.testing.assert_close(covariance, turned[index], rtol=1e-9, atol=1e-12)


def test_the_recorded_value_is_the_diagonal_share_and_rises(trial_of: Callable[..., Any]) -> None:
    trial = trial_of("relu2")
    optimizer = trial.sgd()
    objective = objectives.Eigenbasis()
    teleporter = tf.attach(optimizer, trial.symmetries, objective, schedule=tf.Every(1))
    shares = []
    for _ in range(12):
        trial.backward(0)
        optimizer.step()
        covariances = objective.covariances.values()
        diagonals = sum(c.diagonal(dim1=-2, dim2=-1).square().sum() for c in covariances)
        shares.append(float(diagonals / sum(c.square().sum() for c in covariances)))
    recorded = [record.objective_after for record in teleporter.history]
    assert recorded == pytest.approx(shares[1:], rel=1e-9)
    assert recorded == sorted(recorded)
    assert teleporter.history[0].objective_before < recorded[-1] <= 1


def test_a_nan_gradient_at_a_step_that_does_not_turn_leaves_the_covariance_usable(trial_of: Callable[..., Any]) -> None:
    trial = trial_of("relu2")
    optimizer = trial.sgd()
    objective = objectives.Eigenbasis()
    teleporter = tf.attach(optimizer, trial.symmetries, objective, schedule=tf.At(2))
    for step in range(4):
        trial.backward(step)
        if step == 1:
            trial.model.blocks[0].attention.v.weight.grad[0, 0] = float("nan")
            trial.model.blocks[0].attention.q.weight.grad[0, 0] = float("inf")
        saved = {name: p.detach().clone() for name, p in trial.model.named_parameters()}
        optimizer.step()
        if step == 1:  # SGD writes NaN into the weights even at lr 0
            trial.model.load_state_dict(saved)
    assert all(bool(covariance.isfinite().all()) for covariance in objective.covariances.values())
    assert [record.step for record in teleporter.history] == [2]


def test_state_dict_round_trips(trial_of: Callable[..., Any]) -> None:
    trial = trial_of("relu2")
    optimizer = trial.sgd()
    objective = objectives.Eigenbasis()
    tf.attach(optimizer, trial.symmetries, objective, schedule=tf.At())
    trial.backward(0)
    optimizer.step()
    other = objectives.Eigenbasis()
    other.load_state_dict(objective.state_dict())
    assert other.covariances.keys() == objective.covariances.keys()
    for index, covariance in objective.covariances.items():
        assert torch.equal(other.covariances[index], covariance)
        assert other.covariances[index].data_ptr() != covariance.data_ptr()


def test_random_turns_differ_from_step_to_step_and_agree_between_equal_seeds(trial_of: Callable[..., Any]) -> None:
    """The draw depends on seed and step alone: every rank, and a resumed run, turns to the same basis."""

    def turned(seed: int, step: int) -> list[Tensor]:
        trial = trial_of("relu2")
        optimizer = trial.sgd()
        tf.attach(optimizer, trial.symmetries, "random", tf.At(step), seed=seed)
        for _ in range(step + 1):
            trial.backward(0)
            optimizer.step()
        return [parameter.detach() for parameter in trial.model.parameters()]

    first = turned(seed=3, step=1)
    assert all(map(torch.equal, first, turned(seed=3, step=1)))
    for other in (turned(seed=3, step=2), turned(seed=4, step=1)):
        assert min(float((a - b).norm() / a.norm()) for a, b in zip(first, other, strict=True)) > 0.1


def two_joints(counts: tuple[bool, bool]) -> Bucket:
    """Two joints alike, each of two matrices; of the second joint's, those count that `counts` says."""
    views = [tf.View(name, 0, 1, 4, counts=count) for name, count in zip("abcd", (True, True, *counts), strict=True)]
    return Bucket(tuple(tf.Joint(f"{i}", "test", Orthogonal(4), 1, 4, tuple(views[2 * i : 2 * i + 2]), ()) for i in range(2)))


@pytest.mark.parametrize("counts", [(True, True), (True, False)])
def test_joints_of_one_bucket_may_count_different_numbers_of_matrices(counts: tuple[bool, bool]) -> None:
    objective, bucket = objectives.Eigenbasis(decay=0.0, parts=1), two_joints(counts)
    gradients = {name: torch.randn(4, 7, dtype=torch.float64) for name in "abcd"}
    objective.observe(0, bucket, gradients)
    shares = {name: G @ G.mT / G.square().sum() for name, G in gradients.items()}
    second = shares["c"] + shares["d"] if all(counts) else shares["c"]
    torch.testing.assert_close(objective.covariances[0], torch.stack([shares["a"] + shares["b"], second]))


def test_a_joint_without_a_matrix_that_counts_is_left_out_with_the_reason() -> None:
    joints = two_joints((False, False)).joints
    reasons = [objectives.Eigenbasis().unusable(joint) for joint in joints]
    assert reasons == [None, "no matrix of this joint counts in its gradient covariance"]


def test_before_the_first_gradient_there_is_no_basis_to_turn_to() -> None:
    objective = objectives.Eigenbasis(parts=1)
    move = objectives.Move({}, {}, 0.5, False, torch.Generator())
    assert objective.element(0, bucket_of(Orthogonal(4)), move) is None
    assert objective.state_dict() == {}
    objective.observe(0, bucket_of(Orthogonal(4)), {"w": torch.randn(4, 3, dtype=torch.float64)})
    assert objective.element(0, bucket_of(Orthogonal(4)), move) is not None
    assert list(objective.state_dict()) == ["0"]  # one part: nothing to remember of which comes next
