"""The Triton permutation_action_ against torch's gather, bit by bit, what it leaves alone, and the bytes it moves."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.permutation_action import permutation_action_

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def orders(heads, h, device):
    return torch.stack([torch.randperm(h) for _ in range(heads)]).to(device)


def reordered(tensor, index):
    return torch.stack([head[rows] for head, rows in zip(tensor, index, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(1, 1, 3), (2, 7, 65), (1, 128, 64), (2, 65, 127), (1, 300, 40)])
def test_reorders_the_rows_of_every_view_exactly(heads, h, n, dtype, all_kinds):
    places = all_kinds(heads, h, n, dtype)
    tensors = [p.view for p in places]
    index = orders(2 * heads, h, tensors[0].device)
    exact = [reordered(t, index[i // 4 * heads :][:heads]) for i, t in enumerate(tensors)]
    permutation_action_(tensors, index, joints=2)
    assert all(torch.equal(t, e) for t, e in zip(tensors, exact, strict=True))
    assert all(p.alone() for p in places)


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("h", [257, 1025, 4097])
def test_wide_views_are_reordered_too(h, kind, placed):
    view = placed(kind, 1, h, 5, torch.float32).view
    index = orders(1, h, view.device)
    exact = reordered(view, index)
    permutation_action_([view], index)
    assert torch.equal(view, exact)


def test_bits_that_are_no_numbers_stay_what_they_are(device):
    bits = torch.tensor([0x7F800001, 0x7FC00000, -(1 << 31), 1], dtype=torch.int32, device=device)
    view = bits.clone().view(torch.float32).view(1, 4, 1)
    permutation_action_([view], torch.tensor([[3, 2, 0, 1]], device=device))
    assert torch.equal(view.flatten().view(torch.int32), bits[[3, 2, 0, 1]])


def test_the_inverse_brings_everything_back_and_the_same_again_does_not(placed):
    view = placed("columns", 1, 64, 33, torch.float32).view
    before, index = view.clone(), orders(1, 64, view.device)
    permutation_action_([view], index)
    assert not torch.equal(view, before)
    again = view.clone()
    permutation_action_([again], index)
    permutation_action_([view], index.argsort(1))
    assert torch.equal(view, before) and not torch.equal(again, before)


def test_views_of_the_same_memory_move_one_after_the_other(device):
    W = torch.randn(30, 30, device=device)
    index = orders(1, 30, device)
    exact = W[index[0]][:, index[0]]
    permutation_action_([W[None], W.mT[None]], index)
    assert torch.equal(W, exact)


def test_one_launch_for_each_size_of_entry(placed, traffic):
    kinds = ("rows", "columns", "vector", "offset") * 3
    views = [placed(kind, 1, 16, 32, dtype).view for dtype in DTYPES for kind in kinds]
    with traffic() as seen:
        permutation_action_(views, orders(1, 16, "cpu"))
    assert seen.launches == ["permutation_kernel"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "h", "n"), [("rows", 128, 1024), ("columns", 128, 512), ("rows", 250, 256)])
def test_moves_the_minimum_in_whole_sectors(kind, h, n, dtype, placed, traffic):
    view = placed(kind, 2, h, n, dtype).view
    with traffic() as seen:
        permutation_action_([view], orders(2, h, "cpu"))
    assert seen.bytes <= 1.05 * (2 * view.numel() * view.element_size() + 2 * h * 8)
    assert seen.sector_ratio <= 1.1


def test_a_view_that_does_not_fit_is_refused(placed):
    view = placed("rows", 2, 8, 4, torch.float32).view
    with pytest.raises(ValueError, match=r"must be \(2, 7, ...\)"):
        permutation_action_([view], orders(2, 7, view.device))
