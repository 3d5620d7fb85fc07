"""orthogonal_iteration_ is one step of orthogonal iteration on every backend and instruction set, and the turn it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import orthogonal_iteration_

SIZES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 65, 130]
DTYPES = [torch.float32, torch.float64]


def orthogonal(heads: int, h: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(heads, h, h, dtype=torch.float64))[0].to(dtype)


def covariance_in(basis: Tensor, decades: float = 2.0) -> Tensor:
    """Eigenvectors near the rows of `basis`, eigenvalues from 1 down to 10^-decades."""
    wide = basis.double()
    noise = torch.randn_like(wide) * 0.02
    wide = torch.matrix_exp(noise - noise.mT) @ wide
    values = torch.logspace(0, -decades, wide.shape[-1], dtype=torch.float64)
    return (wide.mT @ (values[:, None] * wide)).to(basis.dtype)


def truth(basis: Tensor, covariance: Tensor) -> Tensor:
    """C Rᵀ = Qᵀ U in float64, the sign of U's diagonal positive."""
    q, r = torch.linalg.qr(covariance.double() @ basis.double().mT)
    return (q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)).mT


def error_of_torch(basis: Tensor, covariance: Tensor) -> float:
    q, r = torch.linalg.qr(covariance @ basis.mT)
    found = (q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)).mT
    return float((found.double() - truth(basis, covariance)).abs().max()) if basis.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", SIZES)
def test_it_is_the_qr_factor_of_c_times_the_basis(way, h, dtype, nan_filled_memory):
    """The shift of 100 eps moves it by as much over the least eigenvalue; a neighbour's covariance is far off."""
    bases = [orthogonal(heads, h, dtype) for heads in (2, 1)]
    covariances = [covariance_in(basis) for basis in bases]
    expected = [truth(b, c) for b, c in zip(bases, covariances, strict=True)]
    allowed = 4 * max(error_of_torch(b, c) for b, c in zip(bases, covariances, strict=True))
    allowed += 1e4 * torch.finfo(dtype).eps
    before = [basis.clone() for basis in bases]
    turns = orthogonal_iteration_(bases, covariances)
    assert turns.shape == (3, h, h) and turns.dtype == dtype
    if h == 0:
        return
    for basis, start, right, turn in zip(bases, before, expected, turns.split([2, 1]), strict=True):
        assert float((basis.double() - right).abs().max()) <= allowed
        torch.testing.assert_close(turn, basis @ start.mT, rtol=0, atol=50 * torch.finfo(dtype).eps)
        eye = torch.eye(h, dtype=dtype).expand_as(basis)
        torch.testing.assert_close(basis @ basis.mT, eye, rtol=0, atol=50 * torch.finfo(dtype).eps)
    if h > 3:
        assert float((bases[1].double() - truth(before[1], covariances[0][:1])).abs().max()) > 10 * allowed


def test_repeated_it_finds_the_eigenbasis_and_the_turns_lead_there(way):
    start = orthogonal(2, 40)
    basis, whole = start.clone(), torch.eye(40, dtype=torch.float64).repeat(2, 1, 1)
    covariance = covariance_in(orthogonal(2, 40), 6.0)
    for _ in range(150):
        whole = orthogonal_iteration_(basis, covariance) @ whole
    inside = basis @ covariance @ basis.mT
    assert float((inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max()) < 1e-9
    torch.testing.assert_close(whole @ start, basis, rtol=0, atol=1e-11)
    values = inside.diagonal(dim1=1, dim2=2)
    assert bool((values[:, :-1] > values[:, 1:]).all())
    first = start @ covariance @ start.mT
    assert float((first - torch.diag_embed(first.diagonal(dim1=1, dim2=2))).abs().max()) > 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-38])
def test_a_covariance_that_says_nothing_leaves_its_basis_and_no_other(way, value):
    basis = orthogonal(2, 21, torch.float32)
    covariance = covariance_in(basis)
    covariance[0] = torch.eye(21) * value
    before = basis.clone()
    turns = orthogonal_iteration_(basis, covariance)
    exact = {"rtol": 0, "atol": 0.0 if value != value or value == float("inf") else 2e-6}
    torch.testing.assert_close(basis[0], before[0], **exact)
    torch.testing.assert_close(turns[0], torch.eye(21), rtol=0, atol=2e-6)
    assert float((basis[1] - before[1]).abs().max()) > 1e-3 and bool(turns.isfinite().all())


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_covariance_of_low_rank_gives_an_orthogonal_basis(way, rank):
    """From the identity, where rows of the image are exact zeros but for the shift."""
    basis = torch.eye(37).repeat(1, 1, 1)
    factor = torch.randn(1, 37, rank)
    factor[:, 20:] = 0
    orthogonal_iteration_(basis, factor @ factor.mT)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(37)[None], rtol=0, atol=5e-6)
    torch.testing.assert_close(basis[0, 20:, 20:], torch.eye(17), rtol=0, atol=1e-3)


def test_ill_conditioned_images_stay_orthogonal(way):
    basis = orthogonal(1, 70, torch.float32)
    orthogonal_iteration_(basis, covariance_in(orthogonal(1, 70, torch.float32), 12.0))
    torch.testing.assert_close(basis @ basis.mT, torch.eye(70)[None], rtol=0, atol=5e-6)


def test_strided_bases_are_updated_where_they_lie(way):
    memory = torch.full((2, 9, 20), 7.0)
    basis = memory[:, :, 3:12]
    basis.copy_(orthogonal(2, 9, torch.float32))
    wide = torch.zeros(2, 9, 18)
    covariance = wide[:, :, ::2]
    covariance.copy_(covariance_in(basis.contiguous()))
    dense = basis.clone(memory_format=torch.contiguous_format)
    turns = orthogonal_iteration_(dense, covariance.contiguous())
    torch.testing.assert_close(orthogonal_iteration_(basis, covariance), turns, rtol=0, atol=0)
    assert torch.equal(basis, dense)
    assert bool((memory[:, :, :3] == 7).all() and (memory[:, :, 12:] == 7).all())


def test_the_same_bits_on_two_runs_and_with_neighbours(way):
    basis = orthogonal(3, 50, torch.float32)
    covariance = covariance_in(basis)
    runs = [basis.clone(), basis.clone()]
    for run in runs:
        orthogonal_iteration_(run, covariance)
    alone = basis[1:2].clone()
    orthogonal_iteration_(alone, covariance[1:2])
    assert torch.equal(*runs)
    torch.testing.assert_close(alone, runs[0][1:2], rtol=0, atol=1e-5)


def test_autograd_notices_the_update(way):
    basis = orthogonal(1, 4)
    weight = torch.ones(1, 4, 4, dtype=torch.float64, requires_grad=True)
    result = (weight * basis).sum()
    orthogonal_iteration_(basis, covariance_in(basis))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_opcheck(way):
    basis = orthogonal(2, 5)
    torch.library.opcheck(
        torch.ops.teleport_fast.orthogonal_iteration_, ([basis], [covariance_in(basis)], torch.zeros(2, 5, 5).double())
    )


@pytest.mark.parametrize(
    ("bases", "covariances", "error", "words"),
    [
        ([], [], ValueError, ["0 for 0", "equal lists"]),
        ([torch.eye(2)[None]], [], ValueError, ["0 for 1"]),
        ([torch.eye(2)[None].half()], [torch.eye(2)[None].half()], TypeError, ["bases[0]", "float16", "float32"]),
        ([torch.eye(2)[None]], [torch.eye(2)[None].double()], TypeError, ["covariances[0]", "float64"]),
        ([torch.eye(2)], [torch.eye(2)], ValueError, ["bases[0]", "(2, 2)", "(heads, h, h)"]),
        ([torch.eye(2)[None]], [torch.eye(3)[None]], ValueError, ["covariances[0]", "(1, 3, 3)", "(1, 2, 2)"]),
        ([torch.eye(2)[None], torch.eye(3)[None]], [torch.eye(2)[None], torch.eye(3)[None]], ValueError, ["bases[1]"]),
        ([torch.eye(2)[None]], [torch.eye(2)[None].to("meta")], ValueError, ["covariances[0]", "meta", "cpu"]),
    ],
)
def test_bad_input_names_the_argument_and_its_value(bases, covariances, error, words):
    with pytest.raises(error) as caught:
        orthogonal_iteration_(bases, covariances)
    assert all(word in str(caught.value) for word in ["orthogonal_iteration_", *words])
