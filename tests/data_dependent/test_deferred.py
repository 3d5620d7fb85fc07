"""A deferred factor is used only where its own check holds, and the loop's answers do not depend on which factor was taken."""

from __future__ import annotations

import math

import pytest
import torch

from teleport_fast.data_dependent import CrossEntropy, MLPAction, reference
from teleport_fast.data_dependent.deferred import Factors, full_rank_factor, square_factor

from .conftest import network, relative

pytestmark = pytest.mark.filterwarnings("ignore::teleport_fast.data_dependent.RankWarning")


def matrix(rows: int, columns: int, condition: float = 1.0) -> torch.Tensor:
    """Gaussian, its first row shrunk by about `condition`."""
    H = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    H[0] /= condition
    return H


@pytest.mark.parametrize("shape", [(6, 40), (60, 200), (24, 24)])
def test_every_factor_is_the_pseudo_inverse(shape: tuple[int, int]) -> None:
    H, A, K = matrix(*shape), torch.randn(3, shape[1], dtype=torch.float64), torch.randn(3, shape[0], dtype=torch.float64)
    wanted = torch.linalg.pinv(H)
    for factors in (Factors(deferred=True), Factors(deferred=False)):
        if factors.deferred and shape[0] == shape[1]:
            continue
        inverse = factors(H, rows=3)
        assert factors.sound() and factors.full_rank
        assert relative(inverse.right(A), A @ wanted) < 1e-11
        assert relative(inverse.right_transposed(K), K @ wanted.mT) < 1e-11
        assert relative(inverse.remainder(A, K), A - K @ wanted.mT) < 1e-11


def test_one_ill_conditioned_factor_makes_all_unsound() -> None:
    factors = Factors(deferred=True)
    factors(matrix(6, 40), rows=3)
    assert factors.sound()
    factors(matrix(6, 40, condition=1e4), rows=3)
    assert not factors.sound()


def test_a_factor_that_does_not_exist_makes_all_unsound() -> None:
    factors, H = Factors(deferred=True), matrix(60, 200)
    H[7] = 0  # H Hᵀ has no Cholesky factor
    factors(H, rows=3)
    assert not factors.sound()


def test_a_square_factor_is_reported_as_a_pseudo_inverse() -> None:
    H = matrix(24, 24)
    square = square_factor(H)
    assert square is not None
    report = full_rank_factor(square)
    A = torch.randn(3, 24, dtype=torch.float64)
    assert report.rank == 24 and relative(report.right(A), A @ torch.linalg.pinv(H)) < 1e-11


def test_a_square_factor_is_refused_near_the_rank_cut() -> None:
    assert square_factor(matrix(24, 24, condition=1e6)) is not None
    assert square_factor(matrix(24, 24, condition=1e12)) is None


@pytest.mark.parametrize(("widths", "batch"), [((20, 8, 6, 3), 30), ((20, 16, 16, 3), 16), ((20, 60, 10, 8, 3), 150), ((9, 5, 3), 6)])
def test_the_loop_ends_where_double_backward_does(widths: tuple[int, ...], batch: int) -> None:
    weights, X = network(widths, batch)
    loss = CrossEntropy(torch.arange(batch) % 3)
    action = MLPAction(weights, X, form="v_exact")
    lr = 1e-3 / max(float(gradient.norm()) for gradient in action.lie_gradient(loss))
    fast = action.teleport(loss, 4, lr, parity=True)
    slow, _ = reference.published_teleport(
        weights, X, loss, "iclr24", action.activation, 4, lr, math.inf, True, lambda *record: None
    )
    for m, (found, wanted) in enumerate(zip(fast.weights, slow, strict=True)):
        assert relative(found, wanted) < 1e-8, m
