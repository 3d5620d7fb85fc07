"""The Triton teleport_adamw_ against the same move and step in float64, and the bytes it moves."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.teleport_adamw import teleport_adamw_
from teleport_fast.ops.teleport_adamw import reference_

STEP = (3.0, 1e-2, 0.9, 0.99, 1e-8, 0.1)  # step, lr, beta1, beta2, eps, weight_decay
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def state(make):
    """Parameters, gradients, first and second moments (not negative), each one view of every kind."""
    lists = [make() for _ in range(4)]
    for p in lists[3]:
        p.view.abs_()
    return lists


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(1, 1, 3), (2, 7, 65), (1, 64, 40)])
def test_moves_and_steps_every_view(heads, h, n, dtype, all_kinds, assert_twice_as_close):
    lists = state(lambda: all_kinds(heads, h, n, dtype))
    views = [[p.view for p in side] for side in lists]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.rand(2 * heads, h, dtype=wide, device=views[0][0].device) + 0.5
    factors = torch.stack([scale, 1 / scale])
    rest = ([0, 1] * 4 + [1, 0] * 4, [0.0, 1.0] + [0.0] * 6, *STEP, 2)
    plain = [[t.clone() for t in side] for side in views]
    exact = [[t.double() for t in side] for side in views]
    gradients = [t.clone() for t in views[1]]
    reference_(*plain, factors, *rest)
    reference_(*exact, factors.double(), *rest)
    teleport_adamw_(*views, factors, *rest)
    for found, p, e in zip(views, plain, exact, strict=True):
        for one, two, three in zip(found, p, e, strict=True):
            assert_twice_as_close(one, two, three)
    assert all(torch.equal(a, b) for a, b in zip(views[1], gradients, strict=True))
    assert all(p.alone() for side in lists for p in side)


@pytest.mark.parametrize("shape", [(1, 16, 24), (1, 16, 4, 6)])
def test_tensors_of_one_entry_may_lie_differently_in_memory(shape):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [torch.rand(shape, dtype=torch.float64, device=device) for _ in range(4)]
    tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    tensors[2] = torch.rand(*shape, 2, dtype=torch.float64, device=device)[..., 0]
    exact = [t.clone() for t in tensors]
    factors = torch.rand(2, 1, 16, dtype=torch.float64, device=device) + 0.5
    teleport_adamw_(*[[t] for t in tensors], factors, [0, 1], [0.0], *STEP, 1)
    reference_(*[[t] for t in exact], factors, [0, 1], [0.0], *STEP, 1)
    for found, expected in zip(tensors, exact, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_without_a_move_it_is_torchs_adamw(placed):
    p, g = (placed("rows", 1, 8, 40, torch.float32).view for _ in range(2))
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    parameter = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    ones = torch.ones(1, 1, 8, device=p.device)
    for step in range(1, 4):
        parameter.grad = g.clone()
        optimizer.step()
        teleport_adamw_([p], [g], [m], [v], ones, [0, 0], [0.0], step, 1e-2, 0.9, 0.999, 1e-8, 0.1)
    assert torch.allclose(p, parameter, rtol=1e-6, atol=1e-7)
    teleport_adamw_([p], [g], [m], [v], 2 * ones, [0, 0], [0.0], 4, 1e-2, 0.9, 0.999, 1e-8, 0.1)
    optimizer.step()
    assert not torch.allclose(p, parameter, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "h", "n"), [("rows", 128, 1024), ("columns", 128, 512)])
def test_moves_four_entries_in_and_three_out_in_whole_sectors(kind, h, n, dtype, placed, traffic):
    views = [placed(kind, 1, h, n, dtype).view for _ in range(4)]
    views[3].abs_()
    with traffic() as seen:
        teleport_adamw_(*[[t] for t in views], torch.ones(2, 1, h), [0, 1], [0.0], *STEP, 1)
    assert seen.launches == ["step_kernel"]
    assert seen.bytes <= 1.05 * (7 * views[0].numel() * views[0].element_size() + 2 * h * 4)
    assert seen.sector_ratio <= 1.1
