"""gram_difference.cu against float64 products: widths 1 to 256, splits, joints, strided views, symmetry, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def gram(tensors: list[Tensor], joints: int, dtype: torch.dtype) -> Tensor:
    run = len(tensors) // joints
    rows = [[t.flatten(2).to(dtype) for t in tensors[j * run : (j + 1) * run]] for j in range(joints)]
    return torch.cat([sum((r @ r.mT for r in of_joint[1:]), of_joint[0] @ of_joint[0].mT) for of_joint in rows])


def difference(plus: list[Tensor], minus: list[Tensor], joints: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = ((plus or minus)[0].shape[0] * joints, *[(plus or minus)[0].shape[1]] * 2)
    s_plus, s_minus = (gram(t, joints, dtype) if t else torch.zeros(shape, dtype=dtype) for t in (plus, minus))
    return s_minus - s_plus, (s_plus + s_minus).diagonal(dim1=1, dim2=2).sum(1)


def check(kernels: Any, plus: list[Tensor], minus: list[Tensor], joints: int = 1, wanted_blocks: int = 1) -> None:
    acc = torch.promote_types((plus or minus)[0].dtype, torch.float32)
    ours = kernels.gram_difference(plus, minus, joints, wanted_blocks)
    assert torch.equal(ours[0], ours[0].mT)
    theirs, exact = difference(plus, minus, joints, acc), difference(plus, minus, joints, torch.float64)
    size = float(exact[1].abs().max()) if exact[1].numel() else 0.0
    for mine, torchs, true in zip(ours, theirs, exact, strict=True):
        # one unit of the largest sum, for where torch happens to be exact; float64 has no better reference than itself
        unit = torch.finfo(acc).eps * (8 if acc == torch.float64 else 1)
        allowed = 2 * (torchs.double() - true).abs().max() + unit * size
        assert (mine.double() - true).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [1, 3, 7, 8, 63, 64, 65, 127, 128])
def test_products_match_float64_on_odd_widths(kernels: Any, dtype: torch.dtype, h: int) -> None:
    for n in (0, 1, 17, 64):
        plus, minus = torch.randn(2, h, n, dtype=dtype), torch.randn(n + 3, 2 * h, dtype=dtype)
        check(kernels, [plus], [minus.as_strided((2, h, n + 3), (h, 1, 2 * h))])


@pytest.mark.parametrize("h", [129, 200, 248, 256])
def test_products_match_float64_on_wide_joints(kernels: Any, h: int) -> None:
    check(kernels, [torch.randn(1, h, 40)], [torch.randn(35, h).t()[None]])
    with pytest.raises(RuntimeError, match="returned -1"):
        kernels.gram_difference([torch.randn(1, h, 4).double()], [torch.randn(1, h, 4).double()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [5, 16, 68])
def test_columns_split_over_blocks_add_up(kernels: Any, dtype: torch.dtype, h: int) -> None:
    plus, minus = torch.randn(1, h, 1200, dtype=dtype), torch.randn(1100, h, dtype=dtype).t()[None]
    check(kernels, [plus], [minus], wanted_blocks=4)


def test_long_sums_are_as_accurate_as_torch(kernels: Any) -> None:
    check(kernels, [torch.randn(1, 16, 20_000) + 0.5], [torch.randn(1, 16, 100)])


def test_one_side_may_be_missing(kernels: Any) -> None:
    check(kernels, [torch.randn(2, 5, 9)], [])
    check(kernels, [], [torch.randn(2, 5, 9)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joints_and_strided_views_go_in_one_launch(kernels: Any, dtype: torch.dtype) -> None:
    fused = torch.randn(3 * 4 * 8, 24, dtype=dtype)
    grouped = torch.randn(96, 20, dtype=dtype).as_strided((4, 8, 2, 20), (24 * 20, 20, 8 * 20, 1))
    convolution = torch.randn(6, 32, 3, 3, dtype=dtype).as_strided((4, 8, 6, 9), (72, 9, 288, 1))
    reader = torch.randn(20, 40, dtype=dtype).as_strided((4, 8, 20), (8, 1, 40), 3)
    heads = [fused[i * 32 : (i + 1) * 32].view(4, 8, 24) for i in range(3)]
    check(kernels, [heads[0], grouped, heads[1], heads[2]], [reader, convolution], joints=2)


def test_the_result_has_the_same_bits_under_every_order(kernels: Any) -> None:
    plus, minus, results = [torch.randn(2, 12, 1500)], [torch.randn(2, 12, 1500)], []
    for seed in range(3):
        kernels.emulator.seed = seed
        results.append(kernels.gram_difference(plus, minus, wanted_blocks=8)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("h", "n", "dtype", "wanted_blocks"),
    [
        (64, 768, torch.float32, 1),
        (64, 768, torch.bfloat16, 1),
        (64, 1536, torch.float32, 4),
        (128, 1024, torch.float32, 1),
        (256, 1024, torch.float32, 1),
    ],
)
def test_traffic_is_near_the_minimum(kernels: Any, h: int, n: int, dtype: torch.dtype, wanted_blocks: int) -> None:
    plus, minus = torch.randn(1, h, n, dtype=dtype), torch.randn(n, h, dtype=dtype).t()[None]
    d, trace = kernels.gram_difference([plus], [minus], wanted_blocks=wanted_blocks)
    traffic = kernels.emulator.traffic()
    minimum = plus.nbytes + minus.nbytes + d.nbytes + trace.nbytes
    assert traffic.bytes <= 1.15 * minimum, traffic.bytes / minimum
    # the mirror image of D goes out as 16-byte halves of sectors
    assert 32 * (traffic.load_sectors + traffic.store_sectors) <= 1.1 * traffic.bytes + d.nbytes / 2, traffic
