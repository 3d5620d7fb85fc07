"""One step of orthogonal iteration: Cholesky-QR is QR where it says so, and says so where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teleport_fast.ops.orthogonal_iteration import householder, images
from teleport_fast.optim.bases import cholesky_qr, next_basis


def random_basis(batch: int, h: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(torch.randn(batch, h, h, dtype=torch.float64))[0].to(dtype)


def covariance_in(basis: Tensor, exponent: float = 1.0) -> Tensor:
    """Eigenvectors in the rows of `basis`, eigenvalues from 1 down to 10^-exponent."""
    h = basis.shape[-1]
    values = torch.logspace(0, -exponent, h, dtype=torch.float64)
    wide = basis.double()
    return (wide.mT @ (values[:, None] * wide)).to(basis.dtype)


def orthogonality(basis: Tensor) -> float:
    wide = basis.double()
    return float((wide @ wide.mT - torch.eye(wide.shape[-1], dtype=torch.float64)).abs().max())


def near(basis: Tensor, angle: float) -> Tensor:
    """The basis after a small turn."""
    skew = torch.randn(*basis.shape, dtype=torch.float64)
    return (torch.matrix_exp(angle * (skew - skew.mT)) @ basis.double()).to(basis.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "h"), [(1, 1), (3, 2), (2, 33)])
def test_a_warm_step_is_the_qr_factorisation_of_c_times_the_basis(dtype: torch.dtype, batch: int, h: int) -> None:
    """Against numpy's convention written out: columns B, C B = B' R with a positive diagonal of R."""
    eigen = random_basis(batch, h, dtype)
    covariance, basis = covariance_in(eigen), near(eigen, 0.01)
    q, r = torch.linalg.qr(covariance.double() @ basis.double().mT)
    expected = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT
    tight = 1e-4 if dtype == torch.float32 else 1e-11
    for by_householder in (False, True):
        found, ill = next_basis(covariance, basis, by_householder)
        assert not ill.any()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tight)
        assert orthogonality(found) < (2e-6 if dtype == torch.float32 else 1e-14)
    if h > 2:
        wrong = next_basis(covariance, random_basis(batch, h, dtype), by_householder=True)[0]
        assert float((wrong.double() - expected).abs().max()) > 0.1


def test_cholesky_leaves_what_is_ill_conditioned_and_householder_does_it() -> None:
    """One of two: a cold basis of a covariance over 12 decades, in float32, beside a warm one."""
    eigen = random_basis(2, 24, torch.float32)
    covariance = covariance_in(eigen, 12.0)
    basis = torch.stack((random_basis(1, 24, torch.float32)[0], near(eigen, 1e-4)[1]))
    covariance[1] = covariance_in(eigen, 1.0)[1]
    assert cholesky_qr(images(covariance, basis))[1].tolist() == [True, False]
    found, ill = next_basis(covariance, basis, by_householder=False)
    assert ill.tolist() == [True, False]
    assert torch.equal(found[0], basis[0]) and not torch.equal(found[1], basis[1])
    again, ill = next_basis(covariance, basis, by_householder=True)
    assert ill.tolist() == [False, False]
    torch.testing.assert_close(again, householder(images(covariance, basis)), rtol=0, atol=0)
    assert orthogonality(found) < 3e-6 and orthogonality(again) < 3e-6


@pytest.mark.parametrize("by_householder", [True, False])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-38])
def test_a_covariance_that_says_nothing_leaves_the_basis(by_householder: bool, value: float) -> None:
    basis = random_basis(1, 5, torch.float32)
    covariance = torch.eye(5).unsqueeze(0) * value
    found, ill = next_basis(covariance, basis, by_householder)
    assert bool(ill.all()) == (value != value or value == float("inf"))
    torch.testing.assert_close(found, basis, rtol=0, atol=1e-6)
    assert orthogonality(found) < 1e-6


def test_directions_without_gradients_stay_where_they_are() -> None:
    """A covariance of rank 2 in a basis whose other three vectors are in its null space already."""
    basis = random_basis(1, 5, torch.float64)
    mix = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    covariance = basis[:, :2].mT @ mix @ basis[:, :2]
    found, _ = next_basis(covariance, basis, by_householder=True)
    torch.testing.assert_close(found[:, 2:], basis[:, 2:], rtol=0, atol=1e-2)
    assert float((found[:, :2] - basis[:, :2]).abs().max()) > 0.1


def test_iteration_converges_to_the_eigenbasis() -> None:
    eigen = random_basis(2, 8, torch.float64)
    covariance, basis = covariance_in(eigen, 3.0), random_basis(2, 8, torch.float64)
    for step in range(80):
        basis, _ = next_basis(covariance, basis, by_householder=step % 2 == 0)
    inside = basis @ covariance @ basis.mT
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < 1e-9
    turned = eigen @ covariance.mT @ near(eigen, 0.5).mT
    assert float((turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).abs().max()) > 1e-3
