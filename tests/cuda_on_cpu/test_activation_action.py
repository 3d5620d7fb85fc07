"""activation_action.cu against the formula in float64: widths 1 to 300, strided Z, shared matrices, signs at zero, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def layouts(batch: int, h: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    """Columns fast, rows fast, a part of a wider tensor, every second column of it."""
    wide = torch.randn(batch, h + 1, 2 * n + 3).to(dtype)
    return [
        torch.randn(batch, h, n).to(dtype),
        torch.randn(batch, n, h).to(dtype).mT,
        wide[:, 1:, 3 : 3 + n],
        wide[:, 1:, 3 : 3 + 2 * n : 2],
    ]


def by_torch(Z: Tensor, matrix: Tensor, slope: Tensor, tangent: bool) -> Tensor:
    z, a = Z.to(matrix.dtype), slope[:, None]
    moved = matrix @ torch.where(z < 0, a * z, z)
    return torch.where((z if tangent else moved) < 0, moved / a, moved)


def check(kernels: Any, batch: int, h: int, n: int, dtype: torch.dtype, tangent: bool) -> None:
    acc = torch.promote_types(dtype, torch.float32)
    for index, Z in enumerate(layouts(batch, h, n, dtype)):
        matrix = torch.eye(h, dtype=acc) + torch.randn(1 if index % 2 else batch, h, h, dtype=acc) / h**0.5
        slope = torch.rand(h, dtype=acc) + 0.05
        exact = by_torch(Z.double(), matrix.double(), slope.double(), tangent)
        theirs = by_torch(Z, matrix, slope, tangent).to(dtype)
        found = kernels.activation_action(Z, matrix, slope, tangent)
        if Z.numel():
            unit = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
            allowed = 2 * (theirs.double() - exact).abs().max() + unit * exact.abs().max()
            assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [1, 3, 7, 8, 63, 64, 65, 127, 128])
def test_moves_as_the_formula_does(kernels: Any, dtype: torch.dtype, h: int, tangent: bool) -> None:
    for n in (0, 1, 33, 130):
        check(kernels, 2, h, n, dtype, tangent)


def test_wide_layers_match_float64(kernels: Any) -> None:
    check(kernels, 1, 300, 140, torch.float32, False)
    check(kernels, 1, 300, 9, torch.float32, True)


def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(kernels: Any, emulator: Any) -> None:
    Z, matrix, slope = torch.randn(2, 70, 150), torch.randn(2, 70, 70), torch.rand(70) + 0.05
    found = []
    for seed in range(3):
        emulator.seed = seed
        found.append([kernels.activation_action(Z, matrix, slope, tangent) for tangent in (False, True)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_acting_twice_is_acting_by_the_product(kernels: Any) -> None:
    first, second = torch.randn(2, 1, 6, 6).double()
    Z, slope = torch.randn(1, 6, 40).double(), torch.rand(6).double() + 0.1
    twice = kernels.activation_action(kernels.activation_action(Z, first, slope), second, slope)
    torch.testing.assert_close(twice, kernels.activation_action(Z, second @ first, slope), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(twice, kernels.activation_action(Z, first @ second, slope), rtol=1e-3)


def test_zero_belongs_to_the_positive_side(kernels: Any) -> None:
    Z = torch.tensor([[[0.0, -0.0, 1.0, -1.0], [1.0, 1.0, 2.0, 0.0]]])
    moved = kernels.activation_action(Z, torch.ones(1, 2, 2), torch.full((2,), 0.5), tangent=True)
    assert moved.tolist() == [[[1, 1, 3, -1], [1, 1, 3, -0.5]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("columns_fast", [True, False])
def test_traffic_is_z_once_per_block_of_rows_and_the_result_once(
    kernels: Any, dtype: torch.dtype, columns_fast: bool, tangent: bool
) -> None:
    h, n = 128, 1024
    Z = torch.randn(1, h, n).to(dtype) if columns_fast else torch.randn(1, n, h).to(dtype).mT
    matrix = torch.randn(1, h, h)
    # Slopes are read with every negative entry, from the first cache: a Z without any shows what memory must deliver.
    kernels.activation_action(Z.abs(), matrix, torch.full((h,), 0.1), tangent)
    traffic = kernels.emulator.traffic()
    least = (h // 64 + 1) * Z.nbytes + n // 128 * matrix.nbytes
    assert traffic.bytes <= 1.1 * least, traffic
    assert traffic.sector_ratio <= 1.1, traffic
