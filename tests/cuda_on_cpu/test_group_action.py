"""group_action.cu against float64 products: widths 1 to 600, strided views in place, joints, neighbours, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def layouts(heads: int, h: int, n: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(storage, view) pairs: rows in memory, columns in memory, a part of a fused tensor, a convolution's reader."""
    fused = torch.randn(3 * heads * h, n, dtype=dtype)
    plain = torch.randn(n, heads * h, dtype=dtype)
    readers = torch.randn(n, heads * h + 5, dtype=dtype)
    convolution = torch.randn(n, heads * h, 3, dtype=dtype)
    return [
        (fused, fused[heads * h : 2 * heads * h].view(heads, h, n)),
        (plain, plain.as_strided((heads, h, n), (h, 1, heads * h))),
        (readers, readers.as_strided((heads, h, n), (h, 1, heads * h + 5), 3)),
        (convolution, convolution.as_strided((heads, h, n, 3), (h * 3, 3, heads * h * 3, 1))),
    ]


def acted(view: Tensor, matrices: Tensor, dtype: torch.dtype) -> Tensor:
    return (matrices.to(dtype) @ view.flatten(2).to(dtype)).view(view.shape)


def check(kernels: Any, heads: int, h: int, n: int, dtype: torch.dtype, wanted_blocks: int = 2) -> None:
    acc = torch.promote_types(dtype, torch.float32)
    g, g_inverse_t = (torch.randn(heads, h, h, dtype=acc) for _ in range(2))
    pairs = layouts(heads, h, n, dtype)
    matrices = [g, g, g_inverse_t, g_inverse_t]
    before = [storage.clone() for storage, _ in pairs]
    exact = [acted(view, m, torch.float64) for (_, view), m in zip(pairs, matrices, strict=True)]
    torchs = [acted(view, m, acc).to(dtype) for (_, view), m in zip(pairs, matrices, strict=True)]
    views = [view for _, view in pairs]
    kernels.group_action_(views[:2], views[2:], g, g_inverse_t, wanted_blocks=wanted_blocks)
    for (storage, view), old, true, theirs in zip(pairs, before, exact, torchs, strict=True):
        if view.numel():
            unit = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
            allowed = 2 * (theirs.double() - true).abs().max() + unit * true.abs().max()
            assert (view.double() - true).abs().max() <= allowed
        view.copy_(old.as_strided(view.shape, view.stride(), view.storage_offset()))
        assert torch.equal(storage, old)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [1, 3, 7, 8, 63, 64, 65, 127, 128])
def test_products_match_float64_and_leave_the_rest_alone(kernels: Any, dtype: torch.dtype, h: int) -> None:
    for n in (0, 1, 33):
        check(kernels, 2, h, n, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("h", "n"), [(16, 700), (64, 300), (200, 40), (256, 68)])
def test_several_panels_and_slices_match_float64(kernels: Any, dtype: torch.dtype, h: int, n: int) -> None:
    check(kernels, 1, h, n, dtype, wanted_blocks=1)
    check(kernels, 1, h, n, dtype, wanted_blocks=1000)


def test_wide_joints_match_float64_until_they_are_refused(kernels: Any) -> None:
    check(kernels, 1, 600, 9, torch.float32)
    with pytest.raises(RuntimeError, match="returned -1"):
        check(kernels, 1, 1025, 1, torch.float32)


def test_joints_take_their_own_matrices(kernels: Any) -> None:
    g, g_inverse_t = torch.randn(6, 5, 5), torch.randn(6, 5, 5)
    plus, minus = [torch.randn(2, 5, 7) for _ in range(6)], [torch.randn(2, 5, 4) for _ in range(3)]
    exact = [g[i // 2 * 2 : i // 2 * 2 + 2] @ t for i, t in enumerate(plus)]
    exact += [g_inverse_t[2 * i : 2 * i + 2] @ t for i, t in enumerate(minus)]
    kernels.group_action_(plus, minus, g, g_inverse_t, joints=3)
    torch.testing.assert_close([*plus, *minus], exact)


def test_half_and_single_precision_mix_in_one_launch(kernels: Any) -> None:
    g, weight, momentum = torch.randn(1, 8, 8), torch.randn(1, 8, 40).bfloat16(), torch.randn(1, 8, 40)
    exact = (g @ weight.float()).bfloat16(), g @ momentum
    kernels.group_action_([weight, momentum], [], g, g)
    torch.testing.assert_close((weight, momentum), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns_fast", [True, False])
@pytest.mark.parametrize(("h", "n"), [(64, 1024), (128, 1024)])
def test_traffic_is_each_entry_once_and_the_matrix_once_a_block(
    kernels: Any, dtype: torch.dtype, columns_fast: bool, h: int, n: int
) -> None:
    weight = torch.randn(1, h, n, dtype=dtype) if columns_fast else torch.randn(n, h, dtype=dtype).t()[None]
    g = torch.randn(1, h, h)
    kernels.group_action_([weight], [], g, g)
    traffic = kernels.emulator.traffic()
    assert traffic.bytes <= 1.05 * (2 * weight.nbytes + g.nbytes), traffic
    assert traffic.sector_ratio <= 1.1, traffic
