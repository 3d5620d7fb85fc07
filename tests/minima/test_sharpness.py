"""Sharpness equals the published losses at the recorded directions, leaves no trace, and is the sphere's mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import teleport_fast as tf
from teleport_fast.minima import losses_around, orthant_directions, sphere_directions, worst_sharpness

from .conftest import Case, explicit_hessian, small_model

PARITY = 1e-9
RADII = [k / 10 for k in range(1, 10)]


def unit(u: Tensor) -> Tensor:
    return u / u.norm(dim=-1, keepdim=True)


def test_losses_at_the_recorded_directions_are_the_published_ones(case: Case) -> None:
    u = case.directions
    losses = losses_around(case.loss, case.weights, RADII, unit(u))
    torch.testing.assert_close(losses, case["sharp_loss_perturb"][:, : u.shape[1]], rtol=PARITY, atol=0)


def test_sharpness_is_the_published_mean() -> None:
    """The published value divides the nine radii's sum by ten."""
    case = Case("w653_b4")
    found = tf.sharpness(case.loss, case.weights, RADII, unit(case.directions))
    assert found == pytest.approx(float(case["sharp_value_mean"]), rel=PARITY)
    assert found * 9 / 10 == pytest.approx(float(case["sharp_value_div10"]), rel=PARITY)


def test_the_correlation_studys_sharpness_is_the_published_one(case: Case) -> None:
    directions = unit(case["corr_sharp_rand_u"]).unsqueeze(1)
    losses = losses_around(case.loss, case.weights, case["corr_sharp_t"], directions)
    torch.testing.assert_close(losses.flatten(), case["corr_sharp_losses"], rtol=PARITY, atol=0)
    found = tf.sharpness(case.loss, case.weights, case["corr_sharp_t"], directions)
    assert found == pytest.approx(float(case["corr_sharp_mean"]), rel=PARITY)


def test_other_directions_give_another_sharpness(case: Case) -> None:
    found = losses_around(case.loss, case.weights, RADII, -unit(case.directions))
    assert float((found - case["sharp_loss_perturb"][:, : found.shape[1]]).abs().max()) > 1e-2


def test_parameters_are_bit_identical_afterwards_also_after_an_error() -> None:
    params, loss_fn = small_model()
    before = [p.detach().clone() for p in params]
    tf.sharpness(loss_fn, params, [0.3, 7.0], sphere_directions(params, 3))
    worst_sharpness(loss_fn, params, 0.5, steps=3)
    calls = itertools.count()

    def failing() -> Tensor:
        if next(calls) == 2:
            raise RuntimeError("out of data")
        return loss_fn()

    with pytest.raises(RuntimeError, match="out of data"):
        tf.sharpness(failing, params, [0.3, 7.0], sphere_directions(params, 3))
    with pytest.raises(ValueError, match="unit norm"):
        tf.sharpness(loss_fn, params, [0.1], torch.cat([unit(torch.ones(1, 26)), torch.ones(1, 26)]))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(p.grad is None for p in params)


def test_a_quadratics_sharpness_on_the_sphere_is_its_mean_eigenvalue() -> None:
    eigenvalues = torch.tensor([8.0, 3.0, 1.0, 0.0, -2.0], dtype=torch.float64)
    w = torch.zeros(5, dtype=torch.float64)
    directions = sphere_directions([w], 4000, torch.Generator().manual_seed(1))
    found = tf.sharpness(lambda: 0.5 * (eigenvalues * w.square()).sum(), [w], [2.0], directions)
    assert found == pytest.approx(0.5 * 4.0 * float(eigenvalues.mean()), rel=0.05)


def test_the_orthant_sees_one_side_of_a_slope_and_the_sphere_both() -> None:
    w = torch.zeros(200, dtype=torch.float64)
    loss = lambda: w.sum()  # noqa: E731
    orthant = tf.sharpness(loss, [w], [1.0], orthant_directions([w], 50, torch.Generator().manual_seed(1)))
    sphere = losses_around(loss, [w], [1.0], sphere_directions([w], 50, torch.Generator().manual_seed(1)))
    assert orthant == pytest.approx(math.sqrt(200) * 0.866, rel=0.02)
    assert abs(float(sphere.mean())) < 4 * float(sphere.std()) / math.sqrt(50)


def test_directions_are_of_unit_norm_and_reproducible() -> None:
    params = [torch.zeros(3, 4), torch.zeros(5)]
    for draw in (sphere_directions, orthant_directions):
        first, second = (torch.stack(list(draw(params, 3, torch.Generator().manual_seed(2)))) for _ in range(2))
        assert first.shape == (3, 17)
        assert torch.equal(first, second)
        torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    assert bool((torch.stack(list(sphere_directions(params, 3))) < 0).any())


def test_the_worst_case_of_a_quadratic_is_its_largest_eigenvalue() -> None:
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    A = torch.randn(6, 6, dtype=torch.float64)
    A = A + A.mT
    largest = float(torch.linalg.eigvalsh(A)[-1])
    found = worst_sharpness(lambda: 0.5 * w @ A @ w, [w], 0.3, steps=200)
    assert found == pytest.approx(0.5 * 0.09 * largest, rel=1e-3)
    assert found <= 0.5 * 0.09 * largest * (1 + 1e-12)


def test_the_worst_case_exceeds_every_random_direction_of_a_network() -> None:
    params, loss_fn = small_model()
    found = worst_sharpness(loss_fn, params, 0.2)
    drawn = losses_around(loss_fn, params, [0.1, 0.2], sphere_directions(params, 200))
    assert found > float(drawn.max())
    top = float(torch.linalg.eigvalsh(explicit_hessian(params, loss_fn))[-1])
    assert found > float(loss_fn().detach()) and top > 0


def test_a_loss_that_breaks_inside_the_ball_is_not_hidden() -> None:
    w = torch.full((2,), 0.1, requires_grad=True)
    assert math.isnan(worst_sharpness(lambda: -w.log().sum(), [w], 1.0, generator=torch.Generator().manual_seed(0)))


def test_bad_arguments_are_named() -> None:
    params, loss_fn = small_model()
    good = torch.eye(26, dtype=torch.float64)[:2]
    cases = [
        ("radii must be positive", lambda: tf.sharpness(loss_fn, params, [0.1, 0.0], good)),
        ("radii must be positive", lambda: tf.sharpness(loss_fn, params, [], good)),
        (r"directions must have 26 entries.*got shape \(4,\)", lambda: tf.sharpness(loss_fn, params, [0.1], torch.eye(4))),
        ("unit norm, got 2; divide", lambda: tf.sharpness(loss_fn, params, [0.1], 2 * good)),
        ("unit norm, got nan", lambda: tf.sharpness(loss_fn, params, [0.1], float("nan") * good)),
        (r"directions must be \(2, n, 26\)", lambda: tf.sharpness(loss_fn, params, [0.1, 0.2], good.unsqueeze(0))),
        ("at least one direction", lambda: tf.sharpness(loss_fn, params, [0.1], iter(()))),
        ("params must hold at least one", lambda: tf.sharpness(loss_fn, [], [0.1], good)),
        ("params must be distinct", lambda: tf.sharpness(loss_fn, [params[0], params[0]], [0.1], good)),
        ("one floating dtype", lambda: tf.sharpness(loss_fn, [params[0], torch.zeros(3)], [0.1], good)),
        ("scalar tensor, got shape", lambda: tf.sharpness(lambda: torch.zeros(3), params, [0.1], good)),
        ("count must be at least 1, got 0", lambda: sphere_directions(params, 0)),
        ("radius must be positive and finite, got -1", lambda: worst_sharpness(loss_fn, params, -1)),
        ("steps and starts must be at least 1, got 0 and 3", lambda: worst_sharpness(loss_fn, params, 1.0, 0)),
        (r"requires_grad=False at \[0\]", lambda: worst_sharpness(lambda: torch.ones(()), [torch.ones(2)], 1.0)),
        ("depend on params", lambda: worst_sharpness(lambda: torch.ones(()), params, 1.0)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
