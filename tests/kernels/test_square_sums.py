"""The Triton square_sums against float64 sums, its order of addition, and the bytes it moves."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.square_sums import square_sums
from teleport_fast.ops.square_sums import square_sums as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(1, 1, 3), (2, 7, 65), (1, 64, 128), (2, 65, 130)])
def test_sums_every_view_of_its_joint(heads, h, n, dtype, all_kinds, assert_twice_as_close):
    tensors = [p.view for p in all_kinds(heads, h, n, dtype)]
    found = square_sums(tensors, joints=2)
    plain = reference(tensors, joints=2)
    truth = reference([t.double() for t in tensors], joints=2)
    for f, p, t in zip(found, plain, truth, strict=True):
        assert f.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_twice_as_close(f, p, t)


def test_a_changed_entry_changes_its_own_row_only(placed):
    view = placed("rows", 2, 8, 40, torch.float32).view
    before = square_sums([view])[0]
    view[1, 3, 20] += 2.0
    changed = square_sums([view])[0] != before
    assert changed.nonzero().tolist() == [[1, 3]]


def test_long_rows_are_split_and_added_in_the_same_order_every_time(placed):
    view = placed("columns", 1, 8, 5000, torch.float32).view
    first, second = square_sums([view]), square_sums([view])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.allclose(first[0][0].double(), view[0].double().square().sum(1), rtol=1e-6)


def test_storage_types_may_be_mixed(placed, assert_twice_as_close):
    tensors = [placed("rows", 1, 8, 40, torch.float16).view, placed("columns", 1, 8, 40, torch.float32).view]
    truth = reference([t.double() for t in tensors])
    for found, plain, exact in zip(square_sums(tensors), reference(tensors), truth, strict=True):
        assert_twice_as_close(found, plain, exact)


def test_a_non_finite_entry_shows_in_its_row(placed):
    view = placed("rows", 1, 8, 40, torch.float32).view
    view[0, 2, 0] = float("nan")
    assert square_sums([view])[0].isnan().nonzero().tolist() == [[0, 2]]


def test_views_that_do_not_divide_into_joints_are_refused(placed):
    with pytest.raises(ValueError, match="equal runs"):
        square_sums([placed("rows", 1, 8, 4, torch.float32).view], joints=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "h", "n"), [("rows", 256, 2048), ("columns", 256, 1024), ("shared", 128, 2048), ("convolution", 128, 1150)]
)
def test_moves_the_minimum_in_whole_sectors(kind, h, n, dtype, placed, traffic):
    view = placed(kind, 2, h, n, dtype).view
    with traffic() as seen:
        out = square_sums([view])
    assert seen.bytes <= 1.05 * (view.numel() * view.element_size() + sum(o.numel() * 4 for o in out))
    assert seen.sector_ratio <= 1.1


def test_two_rows_of_a_sector_apart_are_counted_as_uncoalesced(placed, traffic):
    with traffic() as seen:
        square_sums([placed("strided", 1, 64, 512, torch.float32).view])
    assert seen.sector_ratio > 1.5
