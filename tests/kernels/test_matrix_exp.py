"""The Triton matrix_exp against float64 exponentials: both signs, small and large norms, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.matrix_exp import matrix_exp, matrix_exp_pair

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def matrices(batch, h, norm, dtype, symmetric=False):
    M = torch.randn(batch, h, h, dtype=torch.float64)
    M = M + M.mT if symmetric else M
    return (M / torch.linalg.matrix_norm(M, 2)[:, None, None] * norm).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "norm"), [(1, 5.0), (3, 0.1), (8, 1.0), (16, 5.0), (33, 0.5), (64, 2.0), (65, 1.0)])
def test_both_exponentials_are_twice_as_close_as_torchs(h, norm, dtype, device, assert_twice_as_close):
    M = matrices(3, h, norm, dtype, symmetric=h == 8)
    wide = M.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for sign, found in zip((1, -1), matrix_exp_pair(M.to(device)), strict=True):
        plain, exact = torch.matrix_exp(sign * wide).to(dtype), torch.matrix_exp(sign * M.double())
        assert_twice_as_close(found.cpu(), plain, exact)


def test_the_two_are_each_others_inverse(device):
    plus, minus = (x.cpu() for x in matrix_exp_pair(matrices(4, 7, 3.0, torch.float64).to(device)))
    assert torch.allclose(plus @ minus, torch.eye(7, dtype=torch.float64), atol=1e-12)
    assert not torch.allclose(plus @ plus, torch.eye(7, dtype=torch.float64), atol=1e-2)


def test_one_sign_alone_has_the_same_bits(device):
    M = matrices(2, 33, 2.0, torch.float32).to(device)
    assert torch.equal(matrix_exp(M), matrix_exp_pair(M)[0])


def test_a_rotation_comes_from_a_skew_matrix_and_a_transposed_view(device):
    skew = torch.tensor([[0.0, -2.0], [2.0, 0.0]]).expand(2, 3, 2, 2)
    plus, minus = (x.cpu() for x in matrix_exp_pair(skew.to(device).mT))
    rotation = torch.tensor([[-0.41614684, 0.90929743], [-0.90929743, -0.41614684]])
    assert torch.allclose(plus, rotation.expand(2, 3, 2, 2), atol=1e-6)
    assert torch.allclose(minus, plus.mT, atol=1e-6)


def test_a_nilpotent_matrix_of_a_large_norm_is_exact(device):
    M = torch.tensor([[[0.0, 1000.0], [0.0, 0.0]]])
    assert torch.equal(matrix_exp(M.to(device)).cpu(), torch.tensor([[[1.0, 1000.0], [0.0, 1.0]]]))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_matrix_that_is_not_finite_gives_nan_and_ends(value, device):
    plus, minus = matrix_exp_pair(torch.full((1, 2, 2), value, device=device))
    assert plus.isnan().all() and minus.isnan().all()


def test_no_matrices_and_no_width_give_no_entries(device):
    assert matrix_exp(torch.zeros(0, 4, 4, device=device)).shape == (0, 4, 4)
    assert matrix_exp_pair(torch.zeros(2, 0, 0, device=device))[1].shape == (2, 0, 0)


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"must be \(..., h, h\), got \(2, 3\)"):
        matrix_exp(torch.zeros(2, 3))


def test_moves_the_matrix_in_and_two_out(traffic):
    with traffic() as seen:
        matrix_exp_pair(matrices(16, 32, 1.0, torch.float32))
    assert seen.bytes <= 1.05 * 3 * 16 * 32 * 32 * 4
    assert seen.sector_ratio <= 1.1
