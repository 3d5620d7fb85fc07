"""diagonal_action.cu against torch: factors, shifts, permutations, strided views, untouched neighbours, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def scaled(tensor: Tensor, s: Tensor, exponent: float, shift: float, dtype: torch.dtype) -> Tensor:
    factor = s.to(dtype).pow(exponent).view(*tensor.shape[:2], *[1] * (tensor.dim() - 2))
    return (tensor.to(dtype) + shift) * factor - shift


def layouts(heads: int, h: int, n: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(storage, view) pairs: rows in memory, columns in memory, a part of a fused tensor, a convolution's reader."""
    fused = torch.randn(3 * heads * h, n, dtype=dtype)
    readers = torch.randn(n, heads * h + 5, dtype=dtype)
    convolution = torch.randn(n, heads * h, 2, 3, dtype=dtype)
    plain = torch.randn(n, heads * h, dtype=dtype)
    return [
        (fused, fused[heads * h : 2 * heads * h].view(heads, h, n)),
        (plain, plain.as_strided((heads, h, n), (h, 1, heads * h))),
        (readers, readers.as_strided((heads, h, n), (h, 1, heads * h + 5), 3)),
        (convolution, convolution.as_strided((heads, h, n, 6), (h * 6, 6, heads * h * 6, 1))),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "h", "n"), [(1, 1, 1), (2, 3, 7), (3, 8, 64), (1, 65, 63), (2, 64, 129), (2, 4, 0)])
def test_scaling_matches_float64_and_leaves_the_rest_alone(
    kernels: Any, dtype: torch.dtype, heads: int, h: int, n: int
) -> None:
    for exponent, shift in ((1.0, 0.0), (-1.0, 0.0), (2.0, 1.0), (-2.0, 0.0), (-3.0, 0.0)):
        pairs = layouts(heads, h, n, dtype)
        s = torch.randn(heads, h, dtype=torch.promote_types(dtype, torch.float32)).exp()
        before = [storage.clone() for storage, _ in pairs]
        exact = [scaled(view, s, exponent, shift, torch.float64) for _, view in pairs]
        torchs = [scaled(view, s, exponent, shift, s.dtype).to(dtype) for _, view in pairs]
        views = [view for _, view in pairs]
        kernels.diagonal_action_(views, [s] * 4, [exponent] * 4, [shift] * 4)
        for (storage, view), old, true, theirs in zip(pairs, before, exact, torchs, strict=True):
            # float64 has no better reference than torch itself: a few of its own units instead
            unit = torch.finfo(dtype).eps * (4 if dtype == torch.float64 else 1)
            allowed = 2 * (theirs.double() - true).abs() + unit * (true.abs() + abs(shift))
            assert ((view.double() - true).abs() <= allowed).all()
            view.copy_(old.as_strided(view.shape, view.stride(), view.storage_offset()))
            assert torch.equal(storage, old)


def test_negative_factors_flip_signs(kernels: Any) -> None:
    tensor, s = torch.randn(1, 4, 9), torch.tensor([[-1.0, 2.0, -0.5, 1.0]])
    exact = [tensor * s.pow(e)[..., None] for e in (1, -1, 3)]
    for exponent, true in zip((1.0, -1.0, 3.0), exact, strict=True):
        moved = tensor.clone()
        kernels.diagonal_action_([moved], [s], [exponent], [0.0])
        torch.testing.assert_close(moved, true)


def test_storages_mix_in_one_launch_but_not_with_float64(kernels: Any) -> None:
    weight, momentum, s = torch.randn(1, 8, 40).bfloat16(), torch.randn(1, 8, 40), torch.rand(1, 8) + 0.5
    exact = (weight.float() * s[..., None]).bfloat16(), momentum / s[..., None]
    kernels.diagonal_action_([weight, momentum], [s, s], [1.0, -1.0], [0.0, 0.0])
    torch.testing.assert_close((weight, momentum), exact)
    with pytest.raises(RuntimeError, match="planner"):
        kernels.diagonal_action_([weight, momentum.double()], [s, s], [1.0, -1.0], [0.0, 0.0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "h", "n"), [(1, 1, 1), (2, 3, 7), (3, 8, 64), (1, 65, 300), (2, 64, 129), (2, 4, 0)])
def test_permutations_move_rows_exactly(kernels: Any, dtype: torch.dtype, heads: int, h: int, n: int) -> None:
    pairs = layouts(heads, h, n, dtype)
    index = torch.stack([torch.randperm(h) for _ in range(heads)])
    views, before = [view for _, view in pairs], [storage.clone() for storage, _ in pairs]
    moved = [torch.stack([v[head, index[head]] for head in range(heads)]) for v in views]
    kernels.permutation_action_(views, [index] * 4)
    for (storage, view), old, true in zip(pairs, before, moved, strict=True):
        assert torch.equal(view, true)
        view.copy_(old.as_strided(view.shape, view.stride(), view.storage_offset()))
        assert torch.equal(storage, old)


def test_a_permutation_too_wide_for_shared_memory_is_refused(kernels: Any) -> None:
    wide = torch.zeros(1, 50_000, 1)
    with pytest.raises(RuntimeError, match="planner"):
        kernels.permutation_action_([wide], [torch.arange(50_000)[None]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns_fast", [True, False])
def test_traffic_is_the_minimum_and_coalesced(kernels: Any, dtype: torch.dtype, columns_fast: bool) -> None:
    weight = torch.randn(256, 2048, dtype=dtype) if columns_fast else torch.randn(1024, 512, dtype=dtype).t()
    h = weight.shape[0]
    s, index = torch.rand(1, h) + 0.5, torch.randperm(h)[None]
    kernels.diagonal_action_([weight[None]], [s], [1.0], [0.0])
    traffic = kernels.emulator.traffic()
    assert traffic.bytes <= 1.05 * (2 * weight.nbytes + s.nbytes), traffic
    assert traffic.sector_ratio <= 1.1, traffic
    kernels.permutation_action_([weight[None]], [index])
    traffic = kernels.emulator.traffic()
    assert traffic.sector_ratio <= 1.1, traffic
    # int64 indices are read once per tile: 8 bytes beside 64 to 256 bytes a row, read and written
    assert traffic.bytes <= 1.05 * (2 * weight.nbytes + index.nbytes), traffic
