"""The Triton activation_action and its tangent against the formula in float64, for every layout of Z, and the bytes they move."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.activation_action import activation_action, activation_action_tangent

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def by_torch(Z, matrix, slope, tangent):
    z, a = Z.to(matrix.dtype), slope[:, None]
    moved = matrix @ torch.where(z < 0, a * z, z)
    return torch.where((z if tangent else moved) < 0, moved / a, moved)


def arguments(placed, kind, batch, h, n, dtype, shared=False):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    Z = placed(kind, batch, h, n, dtype).view
    matrix = torch.eye(h, device=Z.device, dtype=wide) + torch.randn(1 if shared else batch, h, h, device=Z.device, dtype=wide) / 4
    return Z, matrix, torch.rand(h, device=Z.device, dtype=wide) + 0.05


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rows", "columns", "offset", "strided"])
@pytest.mark.parametrize(("batch", "h", "n"), [(2, 1, 3), (2, 7, 130), (1, 16, 128), (1, 65, 70)])
def test_moves_as_the_formula_does(batch, h, n, kind, dtype, tangent, placed, assert_twice_as_close):
    Z, matrix, slope = arguments(placed, kind, batch, h, n, dtype, shared=kind == "offset")
    found = (activation_action_tangent if tangent else activation_action)(Z, matrix, slope)
    exact = by_torch(Z.double(), matrix.double(), slope.double(), tangent)
    assert found.is_contiguous() and found.dtype == dtype
    assert_twice_as_close(found, by_torch(Z, matrix, slope, tangent).to(dtype), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_type_keeps_what_the_matrix_and_the_slopes_hold_beyond_it(dtype, placed):
    Z, matrix, slope = arguments(placed, "rows", 1, 40, 64, dtype)
    found = activation_action(Z, matrix, slope)
    exact = by_torch(Z.double(), matrix.double(), slope.double(), False)
    # Negative control: with the matrix rounded to the storage type most results are off by more than their rounding.
    crude = by_torch(Z.double(), matrix.to(dtype).double(), slope.double(), False)
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=0.1)
    assert ((found.double() - exact).abs() <= 0.51 * unit + 1e-4 * torch.finfo(dtype).eps).all()
    assert ((crude - exact).abs() > 0.51 * unit).any()


def test_acting_twice_is_acting_by_the_product(placed):
    Z, first, slope = arguments(placed, "rows", 1, 6, 40, torch.float64)
    second = torch.randn_like(first)
    twice = activation_action(activation_action(Z, first, slope), second, slope)
    torch.testing.assert_close(twice, activation_action(Z, second @ first, slope), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(twice, activation_action(Z, first @ second, slope), rtol=1e-3)


def test_zero_belongs_to_the_positive_side(device):
    Z, M = torch.tensor([[[0.0, -0.0, 1.0, -1.0]]], device=device), torch.ones(1, 1, 1, device=device)
    slope = torch.tensor([0.5], device=device)
    assert activation_action_tangent(Z + 0.0, M, slope).flatten().tolist() == [0, 0, 1, -1]
    column = torch.cat([Z, Z + 1], 1)
    moved = activation_action_tangent(column, torch.ones(1, 2, 2, device=device), slope.expand(2))
    assert moved[0, 0].tolist() == [1, 1, 3, -1]


def test_nothing_in_gives_nothing_out(device):
    for shape in ((2, 3, 0), (0, 3, 4), (2, 0, 4)):
        h = shape[1]
        found = activation_action(torch.ones(shape, device=device), torch.ones(1, h, h, device=device), torch.ones(h, device=device))
        assert found.shape == shape


def test_one_block_of_rows_reads_z_once_and_writes_the_result_once(placed, traffic):
    Z, g, slope = arguments(placed, "rows", 1, 64, 4096, torch.float32)
    with traffic() as seen:
        activation_action(Z, g, slope)
    products = 4096 // 64
    matrices = products * (g.nbytes + 2 * slope.nbytes)
    assert seen.stored == Z.nbytes and seen.loaded == Z.nbytes + matrices
    assert len(seen.launches) == 1 and seen.sector_ratio <= 1.1


def test_a_matrix_that_does_not_fit_is_refused(placed):
    Z, g, slope = arguments(placed, "rows", 2, 4, 3, torch.float32)
    for wrong in ((g[:, :3], slope), (torch.cat([g, g]), slope), (g, slope[:1])):
        with pytest.raises(ValueError, match="to fit Z"):
            activation_action(Z, *wrong)
