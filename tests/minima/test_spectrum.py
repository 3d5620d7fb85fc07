"""Lanczos finds the eigenvalues of the Hessian that eigvalsh finds, repeated ones included, and counts what it can know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teleport_fast.minima import hessian_spectrum

from .conftest import explicit_hessian, small_model


def quadratic(eigenvalues: list[float]) -> tuple[Tensor, Tensor]:
    """(w, H) with a random basis of eigenvectors."""
    Q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    H = Q @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ Q.mT
    return torch.randn(len(eigenvalues), dtype=torch.float64, requires_grad=True), (H + H.mT) / 2


@pytest.mark.parametrize("k", [1, 4, 26])
def test_the_largest_eigenvalues_are_those_of_the_explicit_hessian(k: int) -> None:
    params, loss_fn = small_model()
    H = explicit_hessian(params, loss_fn)
    wanted = torch.linalg.eigvalsh(H).flip(0)[:k]
    found = hessian_spectrum(loss_fn, params, k)
    torch.testing.assert_close(found.eigenvalues, wanted, rtol=1e-9, atol=1e-12)
    assert found.product() == pytest.approx(float(wanted.prod()), rel=1e-7)
    V = found.vectors
    torch.testing.assert_close(V.mT @ V, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float((H @ V - V * found.eigenvalues).norm(dim=0).max()) < 1e-8
    assert torch.equal(found.eigenvalues, found.eigenvalues.sort(descending=True).values)


def test_repeated_eigenvalues_are_all_found() -> None:
    w, H = quadratic([5.0, 5.0, 5.0, 2.0, 2.0] + [0.0] * 20 + [-7.0])
    found = hessian_spectrum(lambda: 0.5 * w @ H @ w, [w], 5)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([5.0, 5.0, 5.0, 2.0, 2.0], dtype=torch.float64))


def test_one_krylov_space_alone_misses_a_repeated_eigenvalue() -> None:
    """The control: of the three fives, one run of three products sees a single one."""
    w, H = quadratic([5.0, 5.0, 5.0, 2.0] + [0.0] * 8)
    with pytest.warns(RuntimeWarning, match="max_products=3"):
        found = hessian_spectrum(lambda: 0.5 * w @ H @ w, [w], 2, max_products=3)
    assert float(found.eigenvalues[1]) == pytest.approx(2.0)


def test_the_largest_are_algebraic_not_in_magnitude() -> None:
    w, H = quadratic([1.0, 0.5, -3.0, -40.0])
    found = hessian_spectrum(lambda: 0.5 * w @ H @ w, [w], 2)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([1.0, 0.5], dtype=torch.float64))


def test_far_fewer_products_than_parameters_suffice() -> None:
    w, H = quadratic([100.0, 50.0, 20.0] + [1 / (k + 1) for k in range(400)])
    found = hessian_spectrum(lambda: 0.5 * w @ H @ w, [w], 3)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([100.0, 50.0, 20.0], dtype=torch.float64))
    assert found.products < 80


def test_the_count_is_of_all_eigenvalues_and_refuses_to_guess() -> None:
    w, H = quadratic([5.0, 4.0, 3.0] + [0.01] * 7)
    loss = lambda: 0.5 * w @ H @ w  # noqa: E731
    found = hessian_spectrum(loss, [w], 4)
    assert (found.count_under(0.1), found.count_under(3.5), found.count_under(6.0)) == (7, 8, 10)
    with pytest.raises(ValueError, match=r"threshold must exceed the smallest eigenvalue found, 4, got 0\.1.*larger k"):
        hessian_spectrum(loss, [w], 2).count_under(0.1)
    assert hessian_spectrum(loss, [w], 10).count_under(-1.0) == 0


def test_a_linear_loss_and_unused_parameters_have_zero_eigenvalues() -> None:
    w, unused = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(hessian_spectrum(lambda: w.sum(), [w], 2).eigenvalues, torch.zeros(2, dtype=torch.float64))
    found = hessian_spectrum(lambda: w.pow(3).sum(), [w, unused], 4).eigenvalues
    torch.testing.assert_close(found, torch.tensor([6.0, 6.0, 6.0, 0.0], dtype=torch.float64))


def test_float32_reaches_its_own_accuracy() -> None:
    w = torch.ones(50, requires_grad=True)
    scales = torch.linspace(1, 3, 50)
    found = hessian_spectrum(lambda: (scales * w.square()).sum() / 2, [w], 2)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([3.0, scales[-2]]), rtol=1e-4, atol=0)


def test_parameters_and_gradients_are_left_alone() -> None:
    params, loss_fn = small_model()
    before = [p.detach().clone() for p in params]
    hessian_spectrum(loss_fn, params, 2)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(params, before, strict=True))


def test_bad_arguments_are_named() -> None:
    params, loss_fn = small_model()
    for message, call in [
        (r"k must be in 1\.\.26, the number of parameters, got 0", lambda: hessian_spectrum(loss_fn, params, 0)),
        (r"k must be in 1\.\.26, .* got 27", lambda: hessian_spectrum(loss_fn, params, 27)),
        ("tolerance must be between 0 and 1, got 0", lambda: hessian_spectrum(loss_fn, params, 1, tolerance=0)),
        ("max_products must be at least 1", lambda: hessian_spectrum(loss_fn, params, 1, max_products=0)),
        ("scalar tensor", lambda: hessian_spectrum(lambda: params[0], params, 1)),
        (r"requires_grad=False at \[0\]", lambda: hessian_spectrum(loss_fn, [torch.ones(2)], 1)),
        ("finite Hessian", lambda: hessian_spectrum(lambda: loss_fn() / 0, params, 1)),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
