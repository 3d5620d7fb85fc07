"""The Triton group_action_ against float64 products, what it leaves alone, and the bytes it moves."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.group_action import group_action_

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def turned(tensors, matrices, joints, dtype):
    """Each joint's matrices times its views, in plain torch."""
    run, heads = len(tensors) // joints, len(matrices) // joints
    out = []
    for index, tensor in enumerate(tensors):
        first = index // run * heads
        product = matrices[first : first + heads].to(dtype) @ tensor.to(dtype).flatten(2)
        out.append(product.view(tensor.shape))
    return out


def element(count, h, dtype, device):
    """A well-conditioned g with its g⁻ᵀ, of a wider type than half."""
    noise = torch.randn(count, h, h, dtype=torch.float64, device=device)
    g = torch.eye(h, dtype=torch.float64, device=device) + noise / (3 * h**0.5)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return g.to(kind), torch.linalg.inv(g).mT.to(kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(2, 1, 8), (1, 7, 65), (2, 64, 63), (1, 65, 40), (1, 129, 7)])
def test_turns_every_view_in_place(heads, h, n, dtype, all_kinds, assert_twice_as_close):
    plus, minus = all_kinds(heads, h, n, dtype), all_kinds(heads, h, n, dtype)
    views = [[p.view for p in side] for side in (plus, minus)]
    g, g_inverse_t = element(2 * heads, h, dtype, views[0][0].device)
    plain = [turned(side, m, 2, dtype) for side, m in zip(views, (g, g_inverse_t), strict=True)]
    exact = [turned(side, m, 2, torch.float64) for side, m in zip(views, (g, g_inverse_t), strict=True)]
    group_action_(*views, g, g_inverse_t, joints=2)
    for side in range(2):
        for found, p, e in zip(views[side], plain[side], exact[side], strict=True):
            assert_twice_as_close(found, p, e)
    assert all(p.alone() for p in plus + minus)


@pytest.mark.parametrize("h", [16, 128])
def test_the_function_between_the_two_sides_stays(h, placed):
    plus, minus = placed("rows", 1, h, 33, torch.float32).view, placed("columns", 1, h, 40, torch.float32).view
    g, _ = element(1, h, torch.float32, plus.device)
    before = minus.double().mT @ plus.double()
    group_action_([plus], [minus], g)
    assert torch.allclose(minus.double().mT @ plus.double(), before, rtol=1e-4, atol=1e-4)
    group_action_([plus], [minus], g, g)
    assert not torch.allclose(minus.double().mT @ plus.double(), before, rtol=1e-4, atol=1e-4)


def test_a_matrix_of_any_strides_will_do(placed):
    view = placed("rows", 2, 7, 20, torch.float64).view
    g = torch.randn(7, 7, 2, dtype=torch.float64, device=view.device).permute(2, 1, 0)
    exact = g @ view
    group_action_([view], [], g)
    assert torch.allclose(view, exact, rtol=1e-13)


def test_half_storage_keeps_what_the_matrix_has_beyond_it(placed):
    view = placed("rows", 1, 16, 64, torch.float16).view
    g = torch.full((1, 16, 16), 0.1, device=view.device)
    exact, rounded = g.double() @ view.double(), g.half().double() @ view.double()
    group_action_([view], [], g)
    half_a_unit = torch.finfo(torch.float16).eps / 2 * exact.abs() * 1.01 + 1e-6
    assert ((view.double() - exact).abs() <= half_a_unit).all()
    assert not ((rounded.half().double() - exact).abs() <= half_a_unit).all()


def test_parameters_gradients_and_momenta_are_one_launch(placed, traffic):
    plus, minus = ([placed(kind, 2, 16, 64, torch.float32).view for kind in ("rows", "columns") * 3] for _ in range(2))
    g, g_inverse_t = element(2, 16, torch.float32, "cpu")
    with traffic() as seen:
        group_action_(plus, minus, g, g_inverse_t)
    assert seen.launches == ["action_kernel"]


def test_a_view_that_does_not_fit_is_refused(placed):
    view = placed("rows", 1, 8, 4, torch.float32).view
    with pytest.raises(ValueError, match=r"must be \(1, 7, ...\)"):
        group_action_([view], [], torch.eye(7, device=view.device).unsqueeze(0))
    with pytest.raises(ValueError, match="equal runs"):
        group_action_([view], [], torch.eye(8, device=view.device).expand(2, 8, 8), joints=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(4, 16, 2048), (2, 64, 2048)])
def test_moves_every_entry_once_in_and_once_out_in_whole_sectors(heads, h, n, dtype, placed, traffic):
    plus, minus = placed("rows", heads, h, n, dtype).view, placed("columns", heads, h, n, dtype).view
    g, g_inverse_t = element(heads, h, dtype, "cpu")
    with traffic() as seen:
        group_action_([plus], [minus], g, g_inverse_t)
    assert seen.bytes <= 1.05 * (4 * plus.numel() * plus.element_size() + 8 * g.numel())
    assert seen.sector_ratio <= 1.1


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2.1), (torch.float64, 3.1)], ids=str)
def test_a_matrix_that_does_not_fit_beside_the_tile_is_read_once_a_tile(dtype, most, placed, traffic):
    view = placed("columns", 1, 128, 512, dtype).view
    with traffic() as seen:
        group_action_([view], [], element(1, 128, dtype, "cpu")[0])
    minimum = 2 * view.numel() * view.element_size()
    assert 1.5 * minimum <= seen.bytes <= most * minimum
    assert seen.sector_ratio <= 1.1
