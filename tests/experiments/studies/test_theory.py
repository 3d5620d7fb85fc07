"""The bounds of docs/theory.md hold on problems with closed forms, break outside their assumptions, and the closed forms are right."""

from __future__ import annotations

import math

import pytest
import torch

from teleport_fast.experiments.studies import theory
from teleport_fast.experiments.studies.newton import (
    Separable,
    axis_steps,
    bowl,
    flow,
    kinked,
    quadratic,
    quartic,
    ridge,
)
from teleport_fast.experiments.studies.smooth import EIGENVALUES, Stochastic, product, saturating, shifted
from teleport_fast.experiments.studies.study import Options
from teleport_fast.minima import hessian_alignment


@pytest.mark.parametrize("problem", [shifted(runs=200), saturating(runs=200)], ids=lambda problem: problem.name)
def test_sgd_with_teleports_keeps_theorem_3_1s_bound(problem: Stochastic) -> None:
    for T in (2, 7, 50):
        measured = problem.descend(T, seed=T)
        assert 0 < measured <= problem.sharper(T) < problem.bound(T)


def test_without_a_beta_on_the_orbit_the_bound_breaks() -> None:
    assert all(product().descend(T, 0) > 10 * product().bound(T) for T in (2, 7, 50))


@pytest.mark.parametrize("problem", [shifted(runs=50), saturating(runs=50), product()], ids=lambda problem: problem.name)
def test_teleports_keep_the_loss_and_end_at_the_orbits_highest_gradient(problem: Stochastic) -> None:
    w = problem.start + 0.1 * torch.randn(problem.start.shape, dtype=torch.float64)
    there = problem.teleport(w)
    torch.testing.assert_close(problem.excess(there), problem.excess(w))
    leaf = there.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.excess(leaf).sum(), leaf)
    torch.testing.assert_close(gradient.square().sum(1), problem.highest(w))
    # Negative control: on the orbit, other points are less steep.
    if problem.name.startswith("½"):
        other = torch.stack([w[:, 0] * 2, w[:, 1] / 2], 1)
    else:
        root = EIGENVALUES.sqrt()
        Q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
        other = (w * root) @ Q / root
    torch.testing.assert_close(problem.excess(other), problem.excess(w))
    leaf = other.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.excess(leaf).sum(), leaf)
    assert bool((gradient.square().sum(1) < 0.999 * problem.highest(w)).all())


@pytest.mark.parametrize("problem", [shifted(runs=1), saturating(runs=1)], ids=lambda problem: problem.name)
def test_samples_are_unbiased_and_beta_smooth(problem: Stochastic) -> None:
    w = torch.randn(1, 4, dtype=torch.float64)
    many = w.expand(40_000, 4)
    samples = problem.sample(many, torch.Generator().manual_seed(0))
    leaf = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.excess(leaf).sum(), leaf)
    assert float((samples.mean(0) - gradient[0]).norm()) < 5 * float(samples.std(0).norm()) / 200
    a, b = torch.randn(2, 2000, 4, dtype=torch.float64)
    differences = problem.sample(a, torch.Generator().manual_seed(1)) - problem.sample(b, torch.Generator().manual_seed(1))
    assert bool((differences.norm(dim=1) <= problem.beta * (a - b).norm(dim=1) * (1 + 1e-9)).all())
    # The theorem's σ²: a sample's squared gradient has the mean 2β (L − L* + σ²) at most.
    assert float(samples.square().sum(1).mean()) <= 2 * problem.beta * (float(problem.excess(w)[0]) + problem.sigma2) * 1.01


@pytest.mark.parametrize("share", [1.0, 0.9, 1.2])
def test_a_step_from_the_highest_gradient_has_theorem_3_2s_two_terms(share: float) -> None:
    for before, after in axis_steps(bowl(), theory.START, share, 5):
        quadratic_term = theory.LIPSCHITZ / (2 * theory.MU) * before**2
        assert after <= (quadratic_term + abs(1 - share) * theory.BETA / theory.MU * before) * (1 + 1e-12)
        assert share == 1.0 or after > 0.1 * abs(1 - share) * before


def test_outside_its_assumptions_theorem_3_2_breaks() -> None:
    constant = theory.LIPSCHITZ / (2 * theory.MU)
    assert all(after > 10 * constant * before**2 for before, after in axis_steps(bowl(), (0.006, 0.03), 1.0, 4, teleport=False))
    order = [math.log(after) / math.log(before) for before, after in axis_steps(kinked(), theory.START, 1.0, 8)]
    assert order[-1] == pytest.approx(1.5, abs=0.05)
    order = [math.log(after) / math.log(before) for before, after in axis_steps(bowl(), theory.START, 1.0, 5)]
    assert order[-1] == pytest.approx(2.0, abs=0.06)


@pytest.mark.parametrize("make", [bowl, kinked, quadratic, ridge, quartic])
def test_the_closed_forms_are_derivatives_and_the_highest_is_an_eigenvector(make: type[Separable]) -> None:
    problem, step = make(), 1e-5
    for function in (problem.f, problem.h):
        for x in (-1.3, -0.05, 0.07, 0.6, 2.0):
            for lower, upper in ((0, 1), (1, 2)):
                difference = (function[lower](x + step) - function[lower](x - step)) / (2 * step)
                assert function[upper](x) == pytest.approx(difference, rel=1e-6, abs=1e-8)
    top = problem.highest(problem.loss((1.0, 2.0)))
    assert problem.loss(top) == pytest.approx(problem.loss((1.0, 2.0)), rel=1e-12)
    assert problem.residual(top) < 1e-9 < problem.residual((1.0, 2.0))


def test_the_residual_is_what_one_hessian_product_says() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    found = hessian_alignment(lambda: 0.5 * w[0] ** 2 + w[1] ** 4, [w])
    assert found.residual == pytest.approx(quartic().residual((1.0, 2.0)), rel=1e-12)
    assert found.curvature == pytest.approx(quartic().rayleigh((1.0, 2.0)), rel=1e-12)


@pytest.mark.parametrize(("make", "suffices"), [(quadratic, True), (ridge, True), (quartic, False)])
def test_one_teleport_suffices_where_the_axis_keeps_beta(make: type[Separable], suffices: bool) -> None:
    problem = make()
    at = problem.highest(problem.loss((1.0, 2.0)))
    for _ in range(400):
        at = problem.step(at, 0.01)
    share = problem.squared_norm(at) / problem.squared_norm(problem.highest(problem.loss(at)))
    assert (share > 1 - 1e-9) if suffices else share < 0.5


def test_a_larger_gradient_lasts_as_long_as_promised() -> None:
    problem, start = ridge(), (0.1, 4.0)
    there = problem.highest(problem.loss(start))
    until = math.log(problem.squared_norm(there) / problem.squared_norm(start)) / (2 * 0.9)
    late = 0
    for (time, a), (_, b) in zip(flow(problem, start, 3.0), flow(problem, there, 3.0), strict=True):
        larger = problem.squared_norm(b) > problem.squared_norm(a)
        assert larger or time >= until
        late += not larger
    assert late > 0


def test_the_study_reports_every_claim_with_its_outcome() -> None:
    outcome = theory.run(Options(quick=True, seeds=(0,)))
    assert all(claim.holds for claim in outcome.claims) and len(outcome.claims) >= 9
    assert sum("it breaks" in claim.bar for claim in outcome.claims) >= 4


def test_a_horizon_under_two_is_refused() -> None:
    with pytest.raises(ValueError, match="T must be at least 2, got 1"):
        shifted(runs=1).descend(1, 0)
