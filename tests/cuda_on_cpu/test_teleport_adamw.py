"""teleport_adamw.cu against the float64 formula: strided views, mixed layouts, shifts, untouched neighbours, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops.teleport_adamw import reference_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STEP = (3.0, 1e-2, 0.9, 0.999, 1e-8, 0.1)


def layouts(heads: int, h: int, n: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(storage, view) pairs: a part of a fused tensor, columns in memory, a part of them, a convolution's reader."""
    fused = torch.randn(3 * heads * h, n, dtype=dtype)
    plain = torch.randn(n, heads * h, dtype=dtype)
    readers = torch.randn(n, heads * h + 5, dtype=dtype)
    convolution = torch.randn(n, heads * h, 2, 3, dtype=dtype)
    return [
        (fused, fused[heads * h : 2 * heads * h].view(heads, h, n)),
        (plain, plain.as_strided((heads, h, n), (h, 1, heads * h))),
        (readers, readers.as_strided((heads, h, n), (h, 1, heads * h + 5), 3)),
        (convolution, convolution.as_strided((heads, h, n, 6), (h * 6, 6, heads * h * 6, 1))),
    ]


def operands(heads: int, h: int, n: int, dtype: torch.dtype) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Storages and views of parameters, gradients, first and second moments, the latter positive."""
    pairs = [layouts(heads, h, n, dtype) for _ in range(4)]
    for storage, _ in pairs[3]:
        storage.abs_()
    return [[s for s, _ in p] for p in pairs], [[v for _, v in p] for p in pairs]


def expected(
    lists: list[list[Tensor]], factors: Tensor, which: list[int], shifts: list[float], dtype: torch.dtype
) -> list[list[Tensor]]:
    copies = [[t.to(dtype).clone(memory_format=torch.contiguous_format) for t in tensors] for tensors in lists]
    reference_(*copies, factors.to(dtype), which, shifts, *STEP, 1)
    return copies


def drawn_factors(heads: int, h: int, dtype: torch.dtype) -> Tensor:
    """Kinds 0 and 1: s and 1/s, some of them negative."""
    s = torch.randn(heads, h, dtype=torch.promote_types(dtype, torch.float32))
    s = s.exp() * torch.where(s > 1.2, -1, 1)
    return torch.stack([s, 1 / s])


def check(kernels: Any, lists: list[list[Tensor]], factors: Tensor, which: list[int], shifts: list[float]) -> None:
    exact = expected(lists, factors, which, shifts, torch.float64)
    theirs = expected(lists, factors, which, shifts, factors.dtype)
    gradients = [g.clone() for g in lists[1]]
    kernels.teleport_adamw_(lists, factors, which, shifts, *STEP)
    for t in (0, 2, 3):
        for i, (ours, true, torchs) in enumerate(zip(lists[t], exact[t], theirs[t], strict=True)):
            # rounding to the storage, and four units of the accumulator where torch happens to be exact
            unit, fine = torch.finfo(ours.dtype).eps, 4 * torch.finfo(factors.dtype).eps
            size = true.abs() + (abs(shifts[i]) * (1 + factors[0].double().abs().max()) if t == 0 else 0)
            stored = torchs.to(ours.dtype).double()
            allowed = 2 * (stored - true).abs() + unit * true.abs() + fine * (size + true.abs().mean().nan_to_num())
            assert ((ours.double() - true).abs() <= allowed).all()
    assert all(map(torch.equal, lists[1], gradients))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "h", "n"), [(1, 1, 1), (2, 3, 7), (3, 8, 64), (1, 65, 63), (2, 64, 129), (2, 4, 0)])
def test_the_move_and_the_step_match_float64_and_leave_the_rest_alone(
    kernels: Any, dtype: torch.dtype, heads: int, h: int, n: int
) -> None:
    storages, lists = operands(heads, h, n, dtype)
    before = [[s.clone() for s in of_kind] for of_kind in storages]
    check(kernels, lists, drawn_factors(heads, h, dtype), [0, 1, 0, 1, 1, 0, 1, 0], [0.0, 0.0, 1.0, 0.0])
    for kept, storage, views in zip(before, storages, lists, strict=True):
        for old, new, view in zip(kept, storage, views, strict=True):
            view.copy_(old.as_strided(view.shape, view.stride(), view.storage_offset()))
            assert torch.equal(new, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_four_tensors_may_lie_differently(kernels: Any, dtype: torch.dtype) -> None:
    heads, h, n = 2, 9, 40
    _, (parameters, gradients, first, second) = operands(heads, h, n, dtype)
    lists = [[parameters[0], parameters[1]], [gradients[1], gradients[0]], [first[2], first[0]], [second[0], second[2]]]
    check(kernels, lists, drawn_factors(heads, h, dtype), [0, 1, 1, 0], [0.0, 0.5])


def test_unaligned_neighbours_fall_back_to_single_entries(kernels: Any) -> None:
    lists = [[torch.rand(8 * 64 + t)[t:].view(1, 8, 64)] for t in range(4)]
    check(kernels, lists, drawn_factors(1, 8, torch.float32), [0, 1], [0.0])


def test_a_factor_used_for_its_inverse_is_noticed(kernels: Any) -> None:
    _, lists = operands(1, 4, 9, torch.float32)
    factors = drawn_factors(1, 4, torch.float32)
    exact = expected(lists, factors, [0] * 4 + [1] * 4, [0.0] * 4, torch.float64)
    kernels.teleport_adamw_(lists, factors, [0] * 8, [0.0] * 4, *STEP)
    assert not torch.allclose(lists[2][0].double(), exact[2][0], rtol=1e-3)


def test_storages_do_not_mix_with_float64(kernels: Any) -> None:
    lists = [[torch.rand(1, 4, 8), torch.rand(1, 4, 8).double()] for _ in range(4)]
    with pytest.raises(RuntimeError, match="planner"):
        kernels.teleport_adamw_(lists, torch.ones(1, 1, 4), [0] * 4, [0.0] * 2, *STEP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns_fast", [True, False])
def test_traffic_is_the_minimum_and_coalesced(kernels: Any, dtype: torch.dtype, columns_fast: bool) -> None:
    shape = (64, 2048) if columns_fast else (512, 256)
    lists = [[torch.rand(shape, dtype=dtype)] for _ in range(4)]
    lists = [[t[None] if columns_fast else t.t()[None] for t in tensors] for tensors in lists]
    factors = drawn_factors(1, lists[0][0].shape[1], dtype)
    kernels.teleport_adamw_(lists, factors, [0, 1], [0.0], *STEP)
    traffic = kernels.emulator.traffic()
    assert traffic.bytes <= 1.05 * (7 * lists[0][0].nbytes + factors.nbytes), traffic
    assert traffic.sector_ratio <= 1.1, traffic
