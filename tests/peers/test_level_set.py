"""Level-set teleportation reaches the closed-form maximum on quadratics, keeps the loss, and never loses ground."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from teleport_fast.minima.point import Closure
from teleport_fast.peers import level_set_teleport
from teleport_fast.peers.level_set import _corrected, _Step
from teleport_fast.peers.oracle import Oracle

LOSS_CHANGE = {torch.float64: 1e-12, torch.float32: 2e-6}


def quadratic(eigenvalues: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """(w, H, top eigenvector): H with a random basis of eigenvectors."""
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    H = Q @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ Q.mT
    return torch.randn(n, dtype=torch.float64, requires_grad=True), (H + H.mT) / 2, Q[:, max(range(n), key=eigenvalues.__getitem__)]


def network(dtype: torch.dtype) -> tuple[nn.Module, Closure]:
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    inputs, labels = torch.randn(20, 7, dtype=dtype), torch.randint(3, (20,))
    return model, lambda: nn.functional.cross_entropy(model(inputs), labels)


@pytest.mark.parametrize("eigenvalues", [[1.0, 3.0], [0.2, 1.0, 2.0, 5.0], [0.1, 0.3, 0.5, 0.9, 1.5, 2.5, 4.0, 9.0]])
def test_on_an_ellipse_the_gradient_is_largest_along_the_top_eigenvector(eigenvalues: list[float]) -> None:
    w, H, top = quadratic(eigenvalues)
    result = level_set_teleport(lambda: 0.5 * w @ H @ w, [w], 400)
    wanted = math.sqrt(2 * result.loss_before * max(eigenvalues))
    assert result.gradient_norm_after == pytest.approx(wanted, rel=1e-8)
    cosine = abs(float(w.detach() @ top)) / float(w.detach().norm())
    assert cosine == pytest.approx(1.0, abs=1e-8)
    assert result.loss_change <= 1e-12
    assert result.kkt <= 1e-6


def test_without_the_projection_the_loss_moves() -> None:
    """The control: the same first step along q = H∇L/‖∇L‖² instead of its tangent part."""
    w, H, _ = quadratic([0.2, 1.0, 2.0, 5.0])
    oracle = Oracle(lambda: 0.5 * w @ H @ w, [w])
    oracle.evaluate()
    start, loss, step = oracle.flat(), oracle.loss, _Step.at(oracle, 0.0)
    rho = 1e-3 / float(step.tangent.square().sum())
    moved = []
    for direction in (step.tangent, step.q):
        oracle.place(start + rho * direction)
        oracle.evaluate()
        moved.append(abs(oracle.loss - loss) / loss)
    assert moved[0] < 1e-4 < moved[1]
    assert moved[1] > 30 * moved[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_network_gains_gradient_at_the_same_loss(dtype: torch.dtype) -> None:
    model, loss_fn = network(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    result = level_set_teleport(loss_fn, model.parameters(), 10)
    assert result.gain > 1.5
    assert result.loss_change <= LOSS_CHANGE[dtype]
    assert loss_fn().item() == pytest.approx(result.loss_after, rel=1e-6)
    norm = math.sqrt(sum(float(g.square().sum()) for g in torch.autograd.grad(loss_fn(), list(model.parameters()))))
    assert norm == pytest.approx(result.gradient_norm_after, rel=1e-5)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_more_steps_never_end_lower_and_each_costs_one_product() -> None:
    norms = []
    for steps in (0, 1, 3, 10, 30):
        torch.manual_seed(1)
        model, loss_fn = network(torch.float64)
        result = level_set_teleport(loss_fn, model.parameters(), steps)
        assert result.hvps == len(result.steps) == steps
        assert result.gradients >= steps + 1
        assert result.gradient_norm_after >= result.gradient_norm_before
        norms.append(result.gradient_norm_after)
    assert norms == sorted(norms)


def test_the_merit_search_takes_back_a_step_that_is_far_too_long() -> None:
    model, loss_fn = network(torch.float64)
    result = level_set_teleport(loss_fn, model.parameters(), 1, step_size=1e9, halvings=60)
    assert result.steps[0].halvings > 5
    assert result.gain >= 1
    assert result.loss_change <= 1e-12


def test_the_cap_holds_after_the_teleport() -> None:
    model, loss_fn = network(torch.float64)
    start = level_set_teleport(loss_fn, model.parameters(), 0).gradient_norm_before
    result = level_set_teleport(loss_fn, model.parameters(), 20, cap=4 * start**2)
    assert start < result.gradient_norm_after <= 2 * start


def test_a_search_that_cannot_move_leaves_every_bit() -> None:
    model, loss_fn = network(torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    result = level_set_teleport(loss_fn, model.parameters(), 5, cap=1e-12)
    assert "no step of 25 halvings" in result.stopped
    assert result.gain == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_error_on_the_way_puts_the_parameters_back() -> None:
    w, H, _ = quadratic([1.0, 3.0])
    start, calls = w.detach().clone(), []

    def loss_fn() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of data")
        return 0.5 * w @ H @ w

    with pytest.raises(RuntimeError, match="out of data"):
        level_set_teleport(loss_fn, [w], 5)
    assert torch.equal(w.detach(), start)


def test_on_a_circle_every_point_is_stationary() -> None:
    w, H, _ = quadratic([2.0, 2.0, 2.0])
    result = level_set_teleport(lambda: 0.5 * w @ H @ w, [w], 5)
    assert result.stopped == "stationary on the level set"
    assert (result.gain, result.steps) == (1, ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"step_size": 0.0}, "step_size must be positive and finite, got 0.0"),
        ({"armijo": 1.0}, "armijo must be between 0 and 1, got 1.0"),
        ({"halvings": 0}, "halvings must be at least 1, got 0"),
        ({"cap": 0.0}, "cap must be positive, got 0.0"),
        ({"tolerance": -1.0}, "tolerance must be positive, got -1.0"),
        ({"kkt": 1.0}, "kkt must be at least 0 and under 1, got 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        level_set_teleport(lambda: w.square().sum(), [w], **arguments)  # type: ignore[arg-type]


def test_points_with_nothing_to_climb_are_refused() -> None:
    w = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="the gradient is 0"):
        level_set_teleport(lambda: w.square().sum(), [w])
    with pytest.raises(ValueError, match="loss_fn must be finite at params, got loss nan"):
        level_set_teleport(lambda: w.sum() * float("nan"), [w])
    with pytest.raises(ValueError, match="must be float32 or float64, got torch"):
        level_set_teleport(lambda: w.sum(), [torch.ones(2, dtype=torch.bfloat16, requires_grad=True)])
    with pytest.raises(ValueError, match="params must require gradients"):
        level_set_teleport(lambda: w.sum(), [torch.ones(2)])
    with pytest.raises(ValueError, match="at least one tensor"):
        level_set_teleport(lambda: w.sum(), [])
    with pytest.raises(ValueError, match="loss_fn must be a function without arguments"):
        level_set_teleport(w.sum(), [w])  # type: ignore[arg-type]


def test_a_loss_that_drifts_is_never_back_on_the_level_set_and_the_teleport_is_undone() -> None:
    w, H, _ = quadratic([0.2, 1.0, 2.0, 5.0])
    start, calls = w.detach().clone(), [0]

    def drifting(rate: float) -> Tensor:
        calls[0] += 1
        return 0.5 * w @ H @ w + rate * max(calls[0] - 4, 0)

    result = level_set_teleport(lambda: drifting(1.0), [w], 2)
    assert result.stopped.startswith("undone: no point of the path is on the level set with a larger gradient; ")
    assert torch.equal(w.detach(), start) and result.gradient_norm_after == pytest.approx(result.gradient_norm_before)
    calls[0] = 0
    assert level_set_teleport(lambda: drifting(0.0), [w], 2).gain > 1


def test_a_correction_that_overshoots_is_halved() -> None:
    w = torch.tensor([1.2], dtype=torch.float64, requires_grad=True)
    oracle = Oracle(lambda: w.tanh().sum(), [w])
    oracle.evaluate()
    whole = (math.tanh(-0.9) - oracle.loss) / oracle.square * oracle.gradient
    assert abs(math.tanh(1.2 + float(whole)) - math.tanh(-0.9)) < oracle.loss - math.tanh(-0.9)  # nearer, from the far side
    assert _corrected(oracle, oracle.flat(), math.tanh(-0.9), 1e-12)
    assert float(w.detach()) == pytest.approx(-0.9, abs=1e-9)
