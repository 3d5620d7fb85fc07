"""Teleports move their measure the way they say and keep the loss; their gradients are what differences of the finite move give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import teleport_fast as tf
from teleport_fast.data_dependent import CrossEntropy, MLPAction, SquaredError
from teleport_fast.minima import (
    MeanCurvature,
    MeanSharpness,
    Measure,
    curvature,
    hessian_spectrum,
    lie_pullback,
    random_generators,
    sphere_directions,
    teleport_to,
)

from .conftest import network, relative
from .test_curvature import softened

pytestmark = pytest.mark.filterwarnings("ignore::teleport_fast.data_dependent.RankWarning")
FORMS = ("u_exact", "v_exact")


def problem(
    widths: tuple[int, ...], batch: int, form: str = "u_exact", bias: bool = False, smooth: bool = False
) -> tuple[MLPAction, CrossEntropy]:
    action = MLPAction(*network(widths, batch, bias), form=form, bias=bias, activation=softened() if smooth else None)
    return action, CrossEntropy(torch.arange(batch) % widths[-1])


def measures(action: MLPAction, loss: CrossEntropy) -> list[Measure]:
    return [MeanSharpness.drawn(action, loss, count=6), MeanCurvature.drawn(action, 3)]


def moved(action: MLPAction, Ms: list[Tensor], t: float) -> MLPAction:
    weights = action.apply_exp(Ms, t)
    return MLPAction(weights, action.X, form=action.form, bias=action.bias, activation=action.activation)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("batch", "smooth"), [(4, True), (4, False), (20, False), (9, True)])
def test_the_pulled_back_gradient_is_the_finite_moves_derivative(form: str, bias: bool, batch: int, smooth: bool) -> None:
    """Batches under, between and over the widths."""
    action, loss = problem((9, 8, 7, 3), batch, form, bias, smooth)
    for measure in measures(action, loss):
        value, gradients = measure.gradient(action)
        assert value == pytest.approx(measure.value(action), rel=1e-10)
        Ms = [M / M.norm() for M in (N[0] for N in random_generators(action, 1))]
        step = 1e-5
        difference = (measure.value(moved(action, Ms, step)) - measure.value(moved(action, Ms, -step))) / (2 * step)
        found = sum(float((G * M).sum()) for G, M in zip(lie_pullback(action, gradients), Ms, strict=True))
        assert found == pytest.approx(difference, rel=1e-4, abs=1e-7)


def test_the_pullback_of_the_hessian_product_is_the_lie_gradient() -> None:
    """J = ‖∇L‖² has dJ/dW = 2H∇L: the same adjoint, by double backward here."""
    for form in FORMS:
        action, loss = problem((9, 8, 7, 3), 4, form)
        leaves = [W.clone().requires_grad_() for W in action.weights]
        gradients = torch.autograd.grad(loss(action.outputs(leaves)), leaves, create_graph=True)
        J = torch.stack([G.square().sum() for G in gradients]).sum()
        for found, wanted in zip(lie_pullback(action, torch.autograd.grad(J, leaves)), action.lie_gradient(loss), strict=True):
            assert relative(found, wanted) < 1e-9


def test_mean_sharpness_is_sharpness_on_the_same_directions() -> None:
    action, loss = problem((6, 5, 4, 3), 4, bias=True)
    directions = torch.stack(list(sphere_directions(action.weights, 7)))
    params = [W.clone() for W in action.weights]
    targets = torch.randn(3, 4, dtype=torch.float64)
    for loss_fn in (loss, SquaredError(targets), lambda Y: (Y - targets).abs().max()):
        for stack in (directions, torch.stack([directions, -directions])):
            wanted = tf.sharpness(lambda: loss_fn(action.outputs(params)), params, [0.1, 0.4], stack)  # noqa: B023
            found = MeanSharpness(loss_fn, [0.1, 0.4], stack)
            assert found.value(action) == pytest.approx(wanted, rel=1e-12)
            assert found.gradient(action)[0] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sharpness", "curvature"])
@pytest.mark.parametrize("direction", ["descend", "ascend"])
def test_twenty_runs_move_the_measure_the_right_way_and_keep_the_loss(form: str, name: str, direction: str) -> None:
    """On the draws that were used and on fresh ones: the issue's bar is 95% of 20 runs with |ΔL|/L ≤ 1e-6."""
    right, fresh_right, sign = 0, 0, 1 if direction == "ascend" else -1
    for seed in range(20):
        torch.manual_seed(seed)
        action, loss = problem((10, 9, 8, 3), 6, form)
        generator = torch.Generator().manual_seed(seed)
        result = teleport_to(action, loss, name, direction, steps=3, generator=generator)
        report = result.report
        assert report.measure == name and report.loss_change <= 1e-6
        assert report.loss_after == pytest.approx(float(loss(action.outputs(result.weights))), rel=1e-12)
        right += sign * (report.after - report.before) > 0
        fresh = MeanSharpness.drawn(action, loss, count=64) if name == "sharpness" else MeanCurvature.drawn(action, 32)
        there = MLPAction(result.weights, action.X, form=form)
        fresh_right += sign * (fresh.value(there) - fresh.value(action)) > 0
    assert right >= 19 and fresh_right >= 19, (right, fresh_right)


def test_the_other_direction_is_the_negative_control() -> None:
    action, loss = problem((10, 9, 8, 3), 6)
    for measure in measures(action, loss):
        up, down = (teleport_to(action, loss, measure, d, 3).report for d in ("ascend", "descend"))
        assert down.after < down.before == up.before < up.after
    shuffled = [W.flip(0) for W in action.weights]
    assert abs(float(loss(action.outputs(shuffled))) / up.loss_before - 1) > 1e-3


def test_a_flatter_minimum_has_a_smaller_hessian() -> None:
    """By the Hessian's trace, which the mean over a small sphere is up to a factor; with a kinked σ the kinks count as well."""
    action, loss = problem((6, 5, 3), 4, smooth=True)
    measure = MeanSharpness.drawn(action, loss, radii=[0.02], count=200)

    def trace(weights: list[Tensor]) -> float:
        leaves = [W.clone().requires_grad_() for W in weights]
        size = sum(W.numel() for W in leaves)
        return float(hessian_spectrum(lambda: loss(action.outputs(leaves)), leaves, size).eigenvalues.sum())

    down, up = (teleport_to(action, loss, measure, d, 4).weights for d in ("descend", "ascend"))
    assert trace(down) < trace(list(action.weights)) < trace(up)


def test_a_batch_over_the_ranks_is_held_to_the_loss_and_says_so() -> None:
    action, loss = problem((9, 8, 7, 3), 30, "v_exact")
    kept = teleport_to(action, loss, MeanCurvature.drawn(action, 4), steps=3).report
    free = teleport_to(action, loss, MeanCurvature.drawn(action, 4), steps=3, loss_tolerance=math.inf).report
    assert kept.loss_change <= 1e-6 < 1e-3 < free.loss_change
    nothing = teleport_to(action, loss, MeanSharpness.drawn(action, loss, count=4), steps=3, loss_tolerance=0.0).report
    assert "keeps the loss" in nothing.stopped and nothing.sizes == () and nothing.after == nothing.before


def test_a_diagonal_element_keeps_the_loss_on_inputs_it_never_saw() -> None:
    action, loss = problem((9, 8, 7, 3), 30, "v_exact")
    other = torch.randn(9, 50, dtype=torch.float64)
    outputs = MLPAction(action.weights, other).outputs()
    result = teleport_to(action, loss, MeanSharpness.drawn(action, loss, count=16), "ascend", 4, subgroup="diagonal")
    assert result.report.after > 1.001 * result.report.before and result.report.loss_change <= 1e-6
    assert relative(MLPAction(result.weights, other).outputs(), outputs) < 1e-10
    few, few_loss = problem((9, 8, 7, 3), 4, "v_exact")
    full = teleport_to(few, few_loss, MeanSharpness.drawn(few, few_loss, count=16), "ascend", 4)
    assert full.report.loss_change <= 1e-6
    assert relative(MLPAction(full.weights, other).outputs(), MLPAction(few.weights, other).outputs()) > 1e-3


def test_nothing_to_climb_and_no_steps() -> None:
    action, loss = problem((5, 4, 3), 3)
    report = teleport_to(action, lambda Y: 0 * Y.sum() + 1, MeanSharpness.drawn(action, lambda Y: 0 * Y.sum() + 1)).report
    assert report.stopped == "the Lie-algebra gradient is 0" and report.sizes == ()
    unmoved = teleport_to(action, loss, "curvature", steps=0)
    assert unmoved.report.before == unmoved.report.after > 0
    assert all(torch.equal(W, V) for W, V in zip(unmoved.weights, action.weights, strict=True))


def test_the_report_reads_as_a_sentence_and_weights_stay_where_they_were() -> None:
    action, loss = problem((5, 4, 3), 3)
    before = [W.clone() for W in action.weights]
    text = str(teleport_to(action, loss, "curvature", steps=2).report)
    assert text.startswith("curvature ") and "in 2 steps" in text
    assert all(torch.equal(W, V) for W, V in zip(before, action.weights, strict=True))


def test_curvature_on_the_same_draws_is_the_measures_value() -> None:
    action, _ = problem((9, 8, 7, 3), 4)
    Ms = random_generators(action, 5)
    assert MeanCurvature(Ms).value(action) == pytest.approx(curvature(action, Ms), rel=1e-12)


def test_bad_arguments_are_named() -> None:
    action, loss = problem((5, 4, 3), 3)
    unit = torch.eye(32, dtype=torch.float64)[:2]
    cases = [
        ("direction must be 'ascend' or 'descend', got 'up'", lambda: teleport_to(action, loss, direction="up")),
        ("measure must be 'sharpness', 'curvature' or a Measure, got 'flatness'", lambda: teleport_to(action, loss, "flatness")),
        ("subgroup must be 'full' or 'diagonal', got 'so'", lambda: teleport_to(action, loss, subgroup="so")),
        ("radius must be positive and finite, got -0.5", lambda: teleport_to(action, loss, radius=-0.5)),
        ("steps must be an integer of at least 0, got -1", lambda: teleport_to(action, loss, steps=-1)),
        ("loss_tolerance must not be negative, got nan", lambda: teleport_to(action, loss, loss_tolerance=math.nan)),
        ("loss_fn must be finite before the teleport, got nan", lambda: teleport_to(action, lambda Y: Y.sum() * math.nan)),
        ("radii must be positive", lambda: MeanSharpness(loss, [0.1, -1], unit)),
        ("directions must be", lambda: MeanSharpness(loss, [0.1], unit[0])),
        ("unit norm, got 2", lambda: MeanSharpness(loss, [0.1], 2 * unit)),
        ("directions must have 32 entries", lambda: MeanSharpness(loss, [0.1], unit[:, :31]).value(action)),
        ("count must be even and at least 2, got 3", lambda: MeanSharpness.drawn(action, loss, count=3)),
        ("keep_null_space=True", lambda: lie_pullback(MLPAction(action.weights, action.X, keep_null_space=False), action.weights)),
        ("Ms must hold one M per hidden layer", lambda: teleport_to(action, loss, MeanCurvature([]))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
