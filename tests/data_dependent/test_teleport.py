"""A teleport never ends below where it began, keeps its cap, says when it is noise, and takes back what more data refuses."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from teleport_fast.data_dependent import CrossEntropy, MLPAction, RankWarning, RoundOffWarning, SquaredError, reference
from teleport_fast.data_dependent.losses import LossFunction

from .conftest import network, relative
from .test_lie_gradient import squared_norm

WIDTHS, BATCH = (14, 12, 11, 10, 3), 8
LOSS = CrossEntropy(torch.arange(BATCH) % 3)


def action_of(form: str, dtype: torch.dtype = torch.float64) -> MLPAction:
    weights, X = network(WIDTHS, BATCH)
    return MLPAction([W.to(dtype) for W in weights], X.to(dtype), form=form)


@pytest.mark.parametrize("lr", [1e-4, 1e-2, 1e3])
@pytest.mark.parametrize("ascend", [True, False])
@pytest.mark.parametrize("form", ["u_exact", "v_exact"])
def test_the_objective_goes_the_right_way_at_any_lr_and_the_loss_stands(form: str, ascend: bool, lr: float) -> None:
    action = action_of(form)
    result = action.teleport(LOSS, 4, lr, ascend=ascend)
    before, after = squared_norm(action, action.weights, LOSS), squared_norm(action, result.weights, LOSS)
    assert after > before if ascend else after < before
    assert result.report.objective_before == pytest.approx(before, rel=1e-9)
    assert result.report.objective_after == pytest.approx(after, rel=1e-9 if lr < 1 else 1e-6)
    # lr 1e3 takes four steps of ‖T‖ = 1: elements with condition numbers in the thousands.
    assert result.report.loss_change is not None
    assert abs(result.report.loss_change) <= (1e-12 if lr < 1 else 1e-9) * float(LOSS(action.outputs()))


def test_the_published_loop_passes_its_cap_and_ours_does_not() -> None:
    start = float(squared_norm(action_of("v_exact"), action_of("v_exact").weights, LOSS))
    cap = 1.2 * start
    ours = action_of("v_exact").teleport(LOSS, 10, 1.0, cap=cap).report
    assert start < ours.objective_after <= cap
    published = action_of("v_exact").teleport(LOSS, 10, 1.0, cap=cap, parity=True).report
    assert published.objective_after > cap


def test_round_off_in_float32_is_said() -> None:
    with pytest.warns(RoundOffWarning, match=r"float32's round-off"):
        assert action_of("u_exact", torch.float32).teleport(LOSS, 1, 1e-9).report.at_round_off
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not action_of("u_exact").teleport(LOSS, 1, 1e-3).report.at_round_off


def test_a_teleport_that_more_data_refuses_is_undone() -> None:
    action = action_of("u_exact")
    calls = iter([1.0, 5.0])
    result = action.teleport(LOSS, 3, 1e-2, recheck=lambda weights: next(calls))
    assert result.report.undone and result.report.stopped.startswith("undone")
    assert all(torch.equal(new, old) for new, old in zip(result.weights, action.weights, strict=True))
    assert not action.teleport(LOSS, 3, 1e-2, recheck=lambda weights: LOSS(action.outputs(weights))).report.undone


@pytest.mark.parametrize(("form", "batch"), [("u_exact", 8), ("v_exact", 8), ("v_exact", 30)])
def test_a_published_loop_is_undone_too(form: str, batch: int) -> None:
    weights, X = network(WIDTHS, batch)
    action, loss = MLPAction(weights, X, form=form), CrossEntropy(torch.arange(batch) % 3)
    calls = iter([1.0, 5.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        result = action.teleport(loss, 2, 1e-2, parity=True, recheck=lambda weights: next(calls))
        assert result.report.undone and all(torch.equal(new, old) for new, old in zip(result.weights, weights, strict=True))
        assert not action.teleport(loss, 2, 1e-2, parity=True, recheck=lambda weights: 1.0).report.undone


def test_a_published_loop_that_leaves_the_finite_numbers_says_so() -> None:
    weights, X = network(WIDTHS, BATCH)
    with pytest.raises(torch.linalg.LinAlgError, match="the published loop left the finite numbers within 1 steps at lr 1e"):
        MLPAction(weights, X).teleport(LOSS, 1, 1e300, parity=True)


def test_a_network_whose_gradient_overflows_is_refused_before_it_moves() -> None:
    weights, X = network(WIDTHS, BATCH)
    with pytest.raises(ValueError, match=r"squared gradient norm is (inf|nan) before the teleport; check the weights and the loss"):
        MLPAction([*weights[:-1], 1e160 * weights[-1]], X).teleport(LOSS, 1)


def test_a_step_out_of_the_finite_numbers_is_halved_until_the_loss_stands() -> None:
    action = action_of("u_exact")
    result = action.teleport(LOSS, 1, 1e6, radius=1e4)
    (step,) = result.report.steps
    assert step.scale < 1e-2 * min(1.0, 1e4 / 1e6)  # exp of the first tries overflows
    assert relative(action.outputs(result.weights), action.outputs()) < 1e-6


def test_a_loss_that_is_no_function_of_the_outputs_is_not_teleported_on() -> None:
    action, noise = action_of("u_exact"), iter(range(1000))
    result = action.teleport(lambda Y: Y.square().sum() + next(noise), 2, 1e-3)
    assert "no step of 30 halvings improves the objective within the cap and keeps the loss" in result.report.stopped
    assert all(torch.equal(new, old) for new, old in zip(result.weights, action.weights, strict=True))
    assert action.teleport(lambda Y: Y.square().sum(), 2, 1e-3).report.stopped == "all steps done"


@pytest.mark.parametrize("kind", ["cross entropy", "squared error", "a function"])
def test_the_fast_published_loop_is_the_double_backward_one(kind: str) -> None:
    weights, X = network((20, 8, 6, 3), 30)
    targets = torch.randn(3, 30, dtype=torch.float64)
    loss: LossFunction = {
        "cross entropy": CrossEntropy(torch.arange(30) % 3),
        "squared error": SquaredError(targets),
        "a function": lambda Y: 0.5 * (Y - targets).square().sum(),
    }[kind]
    action, lr = MLPAction(weights, X, form="v_exact"), 1e-2 if kind == "cross entropy" else 1e-5
    with pytest.warns(RankWarning):
        fast = action.teleport(loss, 6, lr, parity=True)
    slow, _ = reference.published_teleport(
        weights, X, loss, "iclr24", action.activation, 6, lr, math.inf, True, lambda *record: None
    )
    for found, wanted in zip(fast.weights, slow, strict=True):
        assert relative(found, wanted) < 1e-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"radius": -1.0}, "radius must be positive"),
        ({"steps": -1}, "steps must not be negative"),
        ({"cap": 0.0}, "cap must be positive"),
        ({"group": "cayley"}, "group must be"),
        ({"parity": "iclr24"}, "parity must be one of"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        action_of("u_exact").teleport(LOSS, **change)  # type: ignore[arg-type]


def test_the_published_loops_quirks_are_asked_for_by_name() -> None:
    weights, X = network(WIDTHS, BATCH)
    with pytest.raises(ValueError, match="teleport follows hidden='recomputed'; pass parity=True for the published loop"):
        MLPAction(weights, X, hidden="stale").teleport(LOSS)
    weights, X = network(WIDTHS, BATCH, bias=True)
    with pytest.raises(ValueError, match="parity follows the published code, which has no biases"):
        MLPAction(weights, X, bias=True).teleport(LOSS, parity=True)
