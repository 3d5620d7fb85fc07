"""One Hessian-vector product gives every joint's Lie-algebra gradient: equal to double backward and to finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teleport_fast.data_dependent import Activation, CrossEntropy, MLPAction, SquaredError, leaky_relu, reference

from .conftest import network, relative

pytestmark = pytest.mark.filterwarnings("ignore::teleport_fast.data_dependent.RankWarning")
SHAPES = [((14, 12, 11, 10, 3), 8), ((7, 6, 5, 3), 40), ((9, 4, 6, 3), 5)]


def squared_norm(action: MLPAction, weights: list[Tensor], loss: SquaredError | CrossEntropy) -> float:
    leaves = [W.clone().requires_grad_() for W in weights]
    return sum(float(G.square().sum()) for G in torch.autograd.grad(loss(action.outputs(leaves)), leaves))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", ["u_exact", "v_exact"])
@pytest.mark.parametrize(("widths", "batch"), SHAPES)
def test_equals_double_backward_through_the_pseudo_inverses(
    widths: tuple[int, ...], batch: int, form: str, keep: bool
) -> None:
    weights, X = network(widths, batch)
    if not keep:
        # Where the move drops what the batch does not see, every joint but the first sees that at T = 0 already.
        weights, widths = [weights[0], weights[1][:3]], (widths[0], widths[1], 3)
    for loss in (CrossEntropy(torch.arange(batch) % 3), SquaredError(torch.ones(3, batch, dtype=torch.float64))):
        found = MLPAction(weights, X, form=form, keep_null_space=keep).lie_gradient(loss)
        _, _, wanted = reference.lie_gradient(weights, X, loss, form, leaky_relu(0.1), keep)
        for gradient, double in zip(found, wanted, strict=True):
            assert relative(gradient, double) < 1e-8


def test_any_differentiable_loss_is_taken() -> None:
    weights, X = network((9, 6, 3), 5)
    labels = torch.arange(5) % 3
    action = MLPAction(weights, X)
    (by_hand,) = action.lie_gradient(CrossEntropy(labels))
    (by_autograd,) = action.lie_gradient(lambda Y: torch.nn.functional.cross_entropy(Y.mT, labels))
    assert relative(by_autograd, by_hand) < 1e-12


def test_a_linear_loss_has_no_curvature_of_its_own() -> None:
    weights, X = network((9, 6, 3), 5)
    action, C = MLPAction(weights, X), torch.randn(3, 5, dtype=torch.float64)
    (found,) = action.lie_gradient(lambda Y: (C * Y).sum())
    _, _, (wanted,) = reference.lie_gradient(weights, X, lambda Y: (C * Y).sum(), "u_exact", leaky_relu(0.1), True)
    assert relative(found, wanted) < 1e-10
    (bent,) = action.lie_gradient(lambda Y: (C * Y).sum() + Y.square().sum())
    assert relative(bent, wanted) > 1e-2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["u_exact", "v_exact"])
def test_is_the_slope_of_the_squared_gradient_norm(form: str, bias: bool) -> None:
    # A smooth activation with a second derivative, so that central differences are good to 1e-8 of the slope.
    bend = Activation("sinh", torch.sinh, torch.asinh, torch.cosh, torch.sinh)
    weights, X = network((9, 7, 6, 3), 5, bias=bias)
    weights = [0.5 * W for W in weights]
    loss = CrossEntropy(torch.arange(5) % 3)
    action = MLPAction(weights, X, form=form, activation=bend, bias=bias)
    Ms = [torch.randn(k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in action.widths]
    slope = sum(float((G * M).sum()) for G, M in zip(action.lie_gradient(loss), Ms, strict=True))
    step = 1e-5
    up, down = (squared_norm(action, action.apply_exp(Ms, t), loss) for t in (step, -step))
    assert slope == pytest.approx((up - down) / (2 * step), rel=1e-6)
    assert slope != pytest.approx(1.01 * (up - down) / (2 * step), rel=1e-6)
