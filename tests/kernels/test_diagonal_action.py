"""The Triton diagonal_action_ against a float64 product, what it leaves alone, and the bytes it moves."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.diagonal_action import diagonal_action_

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def moved(tensors, factors, which, shifts, joints):
    """(A + c) · factor − c, in plain torch and in the factors' type."""
    out, heads = [], factors.shape[1] // joints
    for index, tensor in enumerate(tensors):
        joint = index * joints // len(tensors)
        factor = factors[which[index], joint * heads : (joint + 1) * heads]
        factor = factor.reshape(*factor.shape, *[1] * (tensor.dim() - 2))
        out.append((tensor.to(factor.dtype) + shifts[index]) * factor - shifts[index])
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(1, 1, 3), (2, 7, 65), (1, 128, 64), (2, 65, 127)])
def test_moves_the_rows_of_every_view(heads, h, n, dtype, all_kinds, assert_twice_as_close):
    places = all_kinds(heads, h, n, dtype)
    tensors = [p.view for p in places]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = torch.rand(3, 2 * heads, h, device=tensors[0].device, dtype=wide) + 0.5
    rest = ([0, 1, 2, 1, 0, 2, 1, 0], [0.0, 0.0, 0.1, 0.0, 1.0, 0.0, 0.0, 0.0], 2)
    exact = moved([t.double() for t in tensors], factors.double(), *rest)
    plain = [t.to(dtype) for t in moved(tensors, factors, *rest)]
    diagonal_action_(tensors, factors, *rest)
    for t, p, e in zip(tensors, plain, exact, strict=True):
        assert_twice_as_close(t, p, e)
    assert all(p.alone() for p in places)


def test_the_inverse_factor_brings_everything_back(placed):
    view = placed("columns", 1, 64, 33, torch.float64).view
    before, factor = view.clone(), torch.rand(1, 1, 64, dtype=torch.float64, device=view.device) + 0.5
    diagonal_action_([view], factor, [0], [0.0])
    assert not torch.allclose(view, before)
    diagonal_action_([view], 1 / factor, [0], [0.0])
    assert torch.allclose(view, before, rtol=1e-15)


def test_views_of_the_same_memory_move_one_after_the_other(placed):
    view = placed("rows", 1, 8, 16, torch.float64).view
    exact = moved([view + 0], torch.full((1, 1, 8), 6.0, dtype=torch.float64, device=view.device), [0], [0.0], 1)[0]
    factors = torch.tensor([2.0, 3.0], dtype=torch.float64, device=view.device).view(2, 1, 1).expand(2, 1, 8)
    diagonal_action_([view, view], factors, [0, 1], [0.0, 0.0])
    assert torch.equal(view, exact)


def test_a_view_that_does_not_fit_is_refused(placed):
    view = placed("rows", 2, 8, 4, torch.float32).view
    with pytest.raises(ValueError, match=r"must be \(2, 7, ...\)"):
        diagonal_action_([view], torch.ones(1, 2, 7, device=view.device), [0], [0.0])


def test_a_whole_model_is_one_launch(placed, traffic):
    views = [placed(kind, 1, 16, 32, torch.float32).view for kind in ("rows", "columns", "vector", "offset") * 5]
    with traffic() as seen:
        diagonal_action_(views, torch.ones(1, 1, 16), [0] * 20, [0.0] * 20)
    assert seen.launches == ["diagonal_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "h", "n"), [("rows", 128, 1024), ("columns", 128, 512), ("convolution", 64, 1150)])
def test_moves_the_minimum_in_whole_sectors(kind, h, n, dtype, placed, traffic):
    view = placed(kind, 2, h, n, dtype).view
    with traffic() as seen:
        diagonal_action_([view], torch.ones(1, 2, h), [0], [0.0])
    assert seen.bytes <= 1.05 * (2 * view.numel() * view.element_size() + 2 * h * 4)
    assert seen.sector_ratio <= 1.1
