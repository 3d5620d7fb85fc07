"""The Triton rotate_step_ against the same step in float64, the torch route of what is wide, and the bytes it moves."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.rotate_step import rotate_step_
from teleport_fast.ops.rotate_step import reference_

STEP = (3.0, 1e-2, 0.9, 0.99, 1e-8, 0.1)  # step, lr, beta1, beta2, eps, weight_decay; nesterov is apart
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def orthogonal(*shape, dtype=torch.float32, device="cpu"):
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64, device=device))[0].to(dtype).contiguous()


def state(placed, kind, heads, h, n, dtype):
    """Parameter, gradient and moments as one kind of view, the second moment well away from 0."""
    wide = accumulation(dtype)
    lists = [placed(kind, heads, h, n, d) for d in (dtype, dtype, wide, wide)]
    lists[3].view.abs_().add_(0.5)
    return lists


def assert_steps(placed_lists, left, right, base, check, nesterov=False):
    views = [p.view for p in placed_lists]
    plain, exact = [t.clone() for t in views], [t.double() for t in views]
    gradient = views[1].clone()
    sides = [[] if side is None else [side] for side in (left, right)]
    reference_(*[[t] for t in plain], *sides, base, *STEP, nesterov)
    reference_(*[[t] for t in exact], *[[t.double() for t in side] for side in sides], base, *STEP, nesterov)
    rotate_step_(*[[t] for t in views], *sides, base, *STEP, nesterov)
    for found, p, e in zip(views, plain, exact, strict=True):
        check(found, p, e)
    assert torch.equal(views[1], gradient)
    assert all(p.alone() for p in placed_lists)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rows", "columns", "shared", "convolution", "offset", "strided"])
@pytest.mark.parametrize(("heads", "h", "n"), [(2, 7, 36), (1, 64, 40)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_sided_turns_step_every_kind_of_view(heads, h, n, side, kind, dtype, placed, assert_twice_as_close):
    lists = state(placed, kind, heads, h, n, dtype)
    wide, view = accumulation(dtype), lists[0].view
    columns = view[0, 0].numel()
    left = orthogonal(heads, h, h, dtype=wide, device=view.device) if side == "left" else None
    right = orthogonal(columns, columns, dtype=wide, device=view.device) if side == "right" else None
    assert_steps(lists, left, right, 0, assert_twice_as_close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_widths_of_many_pieces_step_as_accurately(kind, dtype, placed, assert_twice_as_close):
    lists = state(placed, kind, 1, 100, 33, dtype)
    left = orthogonal(1, 100, 100, dtype=dtype, device=lists[0].view.device)
    assert_steps(lists, left, None, 0, assert_twice_as_close)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("base", [0, 1, 2], ids=["adam", "sign", "row_norm"])
@pytest.mark.parametrize("sides", ["none", "left", "right", "both", "wide"])
def test_every_base_steps_on_every_side(base, sides, nesterov, placed, assert_twice_as_close):
    h, n = (140, 20) if sides == "wide" else (12, 20)
    lists = state(placed, "columns", 2, h, n, torch.float32)
    device = lists[0].view.device
    left = orthogonal(2, h, h, device=device) if sides in ("left", "both", "wide") else None
    right = orthogonal(n, n, device=device) if sides in ("right", "both") else None
    assert_steps(lists, left, right, base, assert_twice_as_close, nesterov)


def test_an_eps_of_zero_reaches_no_row_that_is_not_there(placed):
    views = [p.view for p in state(placed, "rows", 1, 7, 20, torch.float32)]
    rotate_step_(
        *[[t] for t in views],
        [orthogonal(1, 7, 7, device=views[0].device)],
        [],
        0,
        3.0,
        0.1,
        0.9,
        0.99,
        0.0,
        0.0,
        False,
    )
    assert all(t.isfinite().all() for t in views)


def test_a_wrong_basis_steps_elsewhere(placed):
    views = [p.view for p in state(placed, "rows", 1, 16, 20, torch.float32)]
    wrong = [t.clone() for t in views]
    left = orthogonal(1, 16, 16, device=views[0].device)
    rotate_step_(*[[t] for t in views], [left], [], 0, *STEP, False)
    rotate_step_(*[[t] for t in wrong], [left.mT], [], 0, *STEP, False)
    assert not torch.allclose(views[0], wrong[0], rtol=1e-3)


def test_a_bucket_with_shared_bases_is_one_launch(placed, traffic):
    entries = [[p.view for p in state(placed, kind, 2, 16, 64, torch.float32)] for kind in ("rows", "columns", "rows")]
    lists = [list(tensors) for tensors in zip(*entries, strict=True)]
    with traffic() as seen:
        rotate_step_(*lists, [orthogonal(2, 16, 16)] * 3, [], 0, *STEP, False)
    assert seen.launches == ["rotate_kernel"]


@pytest.mark.parametrize(("kind", "h"), [("rows", 16), ("columns", 16)])
def test_moves_four_entries_in_and_three_out_in_whole_sectors(kind, h, placed, traffic):
    views = [p.view for p in state(placed, kind, 1, h, 2048, torch.float32)]
    with traffic() as seen:
        rotate_step_(*[[t] for t in views], [orthogonal(1, h, h)], [], 0, *STEP, False)
    assert seen.bytes <= 1.05 * (7 * views[0].numel() * 4 + h * h * 4)
    assert seen.sector_ratio <= 1.1
