"""covariance.cu against the reference in float64: widths, joints, strided views, useless gradients, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops.covariance import covariance_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def start(joints: int, heads: int, h: int, dtype: torch.dtype) -> Tensor:
    root = torch.randn(joints * heads, h, h, dtype=dtype) / h**0.5
    product = root @ root.mT
    return (product + product.mT) / 2


def check(kernels: Any, tensors: list[Tensor], joints: int = 1, wanted_blocks: int = 1) -> None:
    heads, h = tensors[0].shape[:2]
    acc = torch.promote_types(tensors[0].dtype, torch.float32)
    ours = start(joints, heads, h, acc)
    theirs, exact = ours.clone(), ours.to(torch.float64, copy=True)
    kernels.covariance_(ours, tensors, 0.9, joints, wanted_blocks)
    covariance_(theirs, tensors, 0.9, joints)
    covariance_(exact, [t.double() for t in tensors], 0.9, joints)
    unit = torch.finfo(acc).eps * (8 if acc == torch.float64 else 1)
    allowed = 2 * (theirs.double() - exact).abs().max() + unit * exact.abs().max()
    assert torch.equal(ours, ours.mT)
    assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [1, 3, 8, 63, 64, 65, 128])
def test_updates_match_float64_on_odd_widths(kernels: Any, dtype: torch.dtype, h: int) -> None:
    columns = torch.randn(37, 2 * h, dtype=dtype).as_strided((2, h, 37), (h, 1, 2 * h))
    check(kernels, [torch.randn(2, h, 20, dtype=dtype), columns, torch.randn(2, h, 2, 3, dtype=dtype)])


def test_joints_of_several_tensors_and_splits_match_float64(kernels: Any) -> None:
    check(kernels, [torch.randn(2, 12, 1500) * 10**i for i in range(6)], joints=3, wanted_blocks=50)
    check(kernels, [torch.randn(1, 3, 5) for _ in range(300)], joints=2)


@pytest.mark.parametrize("useless", [0.0, torch.nan, torch.inf])
def test_a_useless_gradient_adds_nothing(kernels: Any, useless: float) -> None:
    good, bad, c = torch.randn(1, 8, 30), torch.randn(1, 8, 30), start(1, 1, 8, torch.float32)
    bad.mul_(useless)
    with_bad, without = c.clone(), c.clone()
    kernels.covariance_(with_bad, [good, bad], 0.9)
    kernels.covariance_(without, [good], 0.9)
    assert torch.equal(with_bad, without)
    assert not torch.equal(with_bad, 0.9 * c)


@pytest.mark.parametrize(
    ("h", "n", "dtype"),
    [(64, 768, torch.float32), (64, 1024, torch.bfloat16), (128, 2048, torch.float32)],
)
def test_traffic_is_the_gradient_once_and_the_partial_products_twice_in_whole_sectors(
    kernels: Any, h: int, n: int, dtype: torch.dtype
) -> None:
    g, c = torch.randn(1, h, n).to(dtype), start(1, 1, h, torch.promote_types(dtype, torch.float32))
    kernels.covariance_(c, [g], 0.9)
    traffic = kernels.emulator.traffic()
    assert traffic.bytes <= 1.15 * (g.nbytes + 2 * c.nbytes), traffic.bytes / (g.nbytes + 2 * c.nbytes)
    assert traffic.sector_ratio <= 1.1, traffic.sector_ratio
