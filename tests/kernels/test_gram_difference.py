"""The Triton gram_difference against float64 Grams: value, symmetry, order of addition, and the bytes it moves."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.gram_difference import gram_difference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def gram(tensors, dtype):
    """Σ X Xᵀ over all views of one joint, in plain torch."""
    return sum(t.to(dtype).flatten(2) @ t.to(dtype).flatten(2).mT for t in tensors)


def trace(matrices):
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(2, 1, 8), (1, 7, 65), (2, 64, 63), (1, 65, 128), (1, 129, 7)])
def test_difference_and_trace_of_all_views(heads, h, n, dtype, all_kinds, assert_twice_as_close):
    plus, minus = ([p.view for p in all_kinds(heads, h, n, dtype)] for _ in range(2))
    D, J = gram_difference(plus, minus, joints=2)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    half = len(plus) // 2
    expected = []
    for kind in (acc, torch.float64):
        runs = [(gram(plus[i : i + half], kind), gram(minus[i : i + half], kind)) for i in (0, half)]
        expected.append((torch.cat([m - p for p, m in runs]), torch.cat([trace(m) + trace(p) for p, m in runs])))
    (plain_D, plain_J), (exact_D, exact_J) = expected
    assert D.dtype == J.dtype == acc
    assert_twice_as_close(D, plain_D, exact_D)
    assert_twice_as_close(J, plain_J, exact_J)
    assert torch.equal(D, D.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_whole_tile_of_128(dtype, placed, assert_twice_as_close):
    plus, minus = placed("rows", 1, 128, 96, dtype).view, placed("columns", 1, 128, 200, dtype).view
    D, _ = gram_difference(plus, minus)
    plain, exact = ((gram([minus], kind) - gram([plus], kind)) for kind in (torch.float32, torch.float64))
    assert_twice_as_close(D, plain, exact)
    assert torch.equal(D, D.mT)


def test_a_missing_side_counts_as_zero(placed):
    view = placed("rows", 2, 7, 40, torch.float64).view
    assert torch.allclose(gram_difference([view], [])[0], -gram([view], torch.float64), rtol=1e-14)
    assert torch.allclose(gram_difference([], [view])[0], gram([view], torch.float64), rtol=1e-14)


def test_exchanging_the_sides_changes_the_sign_of_the_difference_only(placed):
    plus, minus = placed("rows", 1, 16, 128, torch.float32).view, placed("columns", 1, 16, 100, torch.float32).view
    D, J = gram_difference(plus, minus)
    swapped_D, swapped_J = gram_difference(minus, plus)
    assert torch.allclose(swapped_D, -D, atol=1e-4) and torch.allclose(swapped_J, J, rtol=1e-6)
    assert not torch.allclose(swapped_D, D, atol=1e-4)


def test_split_columns_are_added_in_the_same_order_every_time(placed, traffic):
    views = placed("rows", 1, 16, 20000, torch.float32).view, placed("columns", 1, 16, 3000, torch.float32).view
    with traffic() as seen:
        first = gram_difference(*views)
    assert seen.launches == ["gram_kernel", "total_kernel"]
    assert all(torch.equal(a, b) for a, b in zip(first, gram_difference(*views), strict=True))
    assert torch.allclose(first[0].double(), gram(views[1:], torch.float64) - gram(views[:1], torch.float64), rtol=1e-4)


def test_uneven_runs_and_widths_are_refused(placed):
    view = placed("rows", 1, 8, 4, torch.float32).view
    with pytest.raises(ValueError, match="equal runs"):
        gram_difference([view], [view], joints=2)
    with pytest.raises(ValueError, match="all views must be"):
        gram_difference([view], [placed("rows", 1, 9, 4, torch.float32).view])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(4, 16, 2048), (2, 64, 4096), (1, 128, 4096)])
def test_reads_gradients_once_in_whole_sectors(heads, h, n, dtype, placed, traffic):
    plus, minus = placed("rows", heads, h, n, dtype).view, placed("columns", heads, h, n, dtype).view
    with traffic() as seen:
        D, J = gram_difference(plus, minus)
    assert seen.bytes <= 1.15 * (2 * plus.numel() * plus.element_size() + 4 * (D.numel() + J.numel()))
    assert seen.sector_ratio <= 1.1
