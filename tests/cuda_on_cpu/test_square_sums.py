"""square_sums.cu against float64 sums: dtypes, odd and empty sizes, strided views, joints in one launch, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sums(tensors: list[Tensor], joints: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Torch's own sums in the accumulator's dtype, or in `dtype`."""
    run, out = len(tensors) // joints, []
    for first in range(0, len(tensors), run):
        wanted = dtype or torch.promote_types(tensors[first].dtype, torch.float32)
        whole = torch.cat([t.flatten(2).to(wanted) for t in tensors[first : first + run]], 2).flatten(0, 1)
        out.append((whole.square().sum(1), whole.abs().sum(1)))
    return torch.cat([squares for squares, _ in out]), torch.cat([l1 for _, l1 in out])


def check(kernels: Any, tensors: list[Tensor], joints: int = 1) -> None:
    exact = sums(tensors, joints, torch.float64)
    for ours, theirs, true in zip(kernels.square_sums(tensors, joints), sums(tensors, joints), exact, strict=True):
        # float64 has no better reference than torch itself: a few of its own units instead
        unit = torch.finfo(ours.dtype).eps * (8 if ours.dtype == torch.float64 else 1)
        allowed = 2 * (theirs.double() - true).abs().amax() + unit * true.abs().amax() if true.numel() else 0
        assert ours.shape == true.shape
        assert ((ours.double() - true).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns_fast", [True, False])
@pytest.mark.parametrize("n", [0, 1, 7, 63, 64, 129])
def test_sums_match_float64_on_odd_sizes(kernels: Any, dtype: torch.dtype, columns_fast: bool, n: int) -> None:
    for h in (1, 3, 8, 65, 128):
        weight = torch.randn(2 * h, n, dtype=dtype) if columns_fast else torch.randn(n, 2 * h, dtype=dtype).t()
        check(kernels, [weight.unflatten(0, (2, h))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_match_float64_over_several_column_splits(kernels: Any, dtype: torch.dtype) -> None:
    check(kernels, [torch.randn(1, 5, 4100, dtype=dtype), torch.randn(1, 1025, 5, dtype=dtype).mT])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views_are_read_in_place(kernels: Any, dtype: torch.dtype) -> None:
    fused = torch.randn(3 * 4 * 8, 24, dtype=dtype)
    heads = fused[4 * 8 : 2 * 4 * 8].view(4, 8, 24)
    grouped = torch.randn(96, 20, dtype=dtype).as_strided((4, 8, 2, 20), (24 * 20, 20, 8 * 20, 1))
    convolution = torch.randn(6, 32, 3, 3, dtype=dtype).as_strided((4, 8, 6, 9), (72, 9, 288, 1))
    reader = torch.randn(20, 40, dtype=dtype).as_strided((4, 8, 20), (8, 1, 40), 3)
    spaced = torch.randn(20, 70, dtype=dtype).as_strided((4, 8, 20), (16, 2, 70), 1)
    check(kernels, [heads, grouped, convolution, reader, spaced])


def test_joints_of_different_width_go_in_one_launch(kernels: Any) -> None:
    narrow = [torch.randn(2, 4, 30), torch.randn(30, 8).t().unflatten(0, (2, 4))]
    check(kernels, [*narrow, torch.randn(1, 300, 5), torch.randn(1, 300, 0)], joints=2)


def test_the_result_has_the_same_bits_under_every_order(kernels: Any) -> None:
    tensors, results = [torch.randn(1, 9, 5000), torch.randn(700, 9).t()[None]], []
    for seed in range(3):
        kernels.emulator.seed = seed
        results.append(torch.stack(kernels.square_sums(tensors)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns_fast", [True, False])
def test_traffic_is_the_minimum_and_coalesced(kernels: Any, dtype: torch.dtype, columns_fast: bool) -> None:
    weight = torch.randn(256, 2048, dtype=dtype) if columns_fast else torch.randn(1024, 512, dtype=dtype).t()
    squares, l1 = kernels.square_sums([weight[None]])
    traffic = kernels.emulator.traffic()
    minimum = weight.nbytes + squares.nbytes + l1.nbytes
    assert traffic.bytes <= 1.05 * minimum, traffic.bytes / minimum
    assert traffic.sector_ratio <= 1.1, traffic


def test_a_size_that_disagrees_with_its_joint_is_refused(kernels: Any) -> None:
    with pytest.raises(RuntimeError, match="returned -1"):
        kernels.square_sums([torch.randn(1, 4, 3), torch.randn(1, 5, 3)])
