"""One Hessian-vector product says whether a symmetry can change the gradient norm to first order."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.data_dependent import CrossEntropy, MLPAction
from teleport_fast.minima import curve_derivatives, hessian_alignment, random_generators

from .conftest import explicit_hessian, network, small_model


def test_it_is_what_the_written_out_hessian_gives() -> None:
    params, loss_fn = small_model()
    g = torch.cat([x.flatten() for x in torch.autograd.grad(loss_fn(), params)])
    Hg = explicit_hessian(params, loss_fn) @ g
    curvature = float(g @ Hg / (g @ g))
    found = hessian_alignment(loss_fn, params)
    assert found.curvature == pytest.approx(curvature, rel=1e-9)
    assert found.residual == pytest.approx(float((Hg - curvature * g).norm() / Hg.norm()), rel=1e-9)
    assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-9)
    assert found.loss == pytest.approx(float(loss_fn().detach()), rel=1e-12)
    assert 0.05 < found.residual <= 1
    assert all(p.grad is None for p in params)


def test_an_eigenvector_has_no_residual_and_its_eigenvalue() -> None:
    Q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    values = torch.tensor([4.0, 3.0, 2.0, 1.0, -1.0], dtype=torch.float64)
    H = Q @ values.diag() @ Q.mT
    for index, value in enumerate(values):
        w = Q[:, index].clone().requires_grad_()
        found = hessian_alignment(lambda: 0.5 * w @ H @ w, [w])  # noqa: B023
        assert found.residual < 1e-12 and found.curvature == pytest.approx(float(value))
    mixed = (Q[:, 0] + Q[:, 3]).requires_grad_()
    assert hessian_alignment(lambda: 0.5 * mixed @ H @ mixed, [mixed]).residual > 0.1


def test_the_residual_bounds_how_fast_the_papers_action_moves_the_gradient_norm() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        weights, X = network((7, 6, 5, 3), 4)
        action, loss = MLPAction(weights, X), CrossEntropy(torch.arange(4) % 3)
        params = [W.clone().requires_grad_() for W in weights]
        found = hessian_alignment(lambda: loss(action.outputs(params)), params)  # noqa: B023
        # ‖Hg‖ from its parts: λ‖g‖ along g, the residual across.
        size = abs(found.curvature) * found.gradient_norm / (1 - found.residual**2) ** 0.5
        Ms = [M[0] for M in random_generators(action, 1)]
        first, _ = curve_derivatives(action, Ms)
        speed = sum(float(v.square().sum()) for v in first) ** 0.5
        slope = sum(float((G * M).sum()) for G, M in zip(action.lie_gradient(loss), Ms, strict=True))
        assert abs(slope) <= 2 * found.residual * size * speed * (1 + 1e-9)
        assert abs(slope) > 1e-3 * 2 * found.residual * size * speed


def test_flat_and_straight_losses() -> None:
    w = torch.ones(3, requires_grad=True)
    assert hessian_alignment(lambda: w.sum(), [w]).residual == 0
    assert hessian_alignment(lambda: (w - 1).square().sum(), [w]).residual == 0
    with pytest.raises(ValueError, match="loss_fn must depend on params"):
        hessian_alignment(lambda: torch.ones(()), [w])
