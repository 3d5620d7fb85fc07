"""The Triton grad_norm_objective against what the moved gradients' norm is in float64."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.grad_norm_objective import grad_norm_objective


def candidates(count, heads, h, dtype, device):
    noise = torch.randn(count, heads, h, h, dtype=torch.float64, device=device)
    return (torch.eye(h, dtype=torch.float64, device=device) + noise / (4 * h**0.5)).to(dtype)


def moved_norm(plus, minus, g):
    """‖g⁻ᵀG₊‖² + ‖gG₋‖² per head: the gradients are moved, nothing about Grams is assumed."""
    g_inverse_t = torch.linalg.inv(g).mT
    pairs = [(g_inverse_t, t) for t in plus] + [(g, t) for t in minus]
    return torch.stack([(m @ t.to(g.dtype).flatten(2)).square().sum((1, 2)) for m, t in pairs]).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(2, 1, 8), (2, 7, 65), (1, 64, 63), (1, 65, 8)])
def test_is_the_squared_norm_of_the_moved_gradients(heads, h, n, dtype, all_kinds, assert_twice_as_close):
    plus, minus = ([p.view for p in all_kinds(heads, h, n, dtype)] for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = candidates(3, heads, h, wide, plus[0].device)
    found = grad_norm_objective(plus, minus, g)
    plain, exact = (torch.stack([moved_norm(plus, minus, c.to(kind)) for c in g]) for kind in (wide, torch.float64))
    assert found.dtype == wide
    assert_twice_as_close(found, plain, exact)


def test_a_rotation_leaves_it_and_a_stretch_does_not(placed):
    plus, minus = placed("rows", 1, 8, 40, torch.float64).view, placed("columns", 1, 8, 33, torch.float64).view
    here = plus.square().sum() + minus.square().sum()
    rotation = torch.linalg.qr(torch.randn(1, 8, 8, dtype=torch.float64, device=plus.device))[0]
    assert grad_norm_objective([plus], [minus], rotation[None]).item() == pytest.approx(here.item(), rel=1e-12)
    assert grad_norm_objective([plus], [minus], 2 * rotation[None]).item() != pytest.approx(here.item(), rel=1e-3)


def test_the_gradients_are_read_once_for_all_candidates(placed, traffic):
    plus, minus = placed("rows", 2, 16, 2048, torch.float32).view, placed("columns", 2, 16, 2048, torch.float32).view
    g = candidates(8, 2, 16, torch.float32, "cpu")
    with traffic() as seen:
        grad_norm_objective(plus, minus, g)
    assert seen.loaded <= 1.15 * 2 * plus.numel() * 4 + 8 * 2 * 6 * 16 * 16 * 4


def test_every_joint_has_its_own_gradients(placed):
    plus, minus = ([placed(kind, 2, 7, 20, torch.float64).view for kind in ("rows", "columns")] for _ in range(2))
    g = candidates(3, 4, 7, torch.float64, plus[0].device)
    apart = [grad_norm_objective([plus[j]], [minus[j]], g[:, 2 * j : 2 * j + 2]) for j in range(2)]
    assert torch.allclose(grad_norm_objective(plus, minus, g, joints=2), torch.cat(apart, 1), rtol=1e-13)
    assert not torch.allclose(apart[0], apart[1], rtol=1e-3)


def test_a_missing_side_counts_as_zero_and_a_singular_candidate_as_infinite(placed):
    view = placed("rows", 1, 4, 20, torch.float64).view
    g = torch.stack([torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)]).to(view.device)[
        :, None
    ]
    assert grad_norm_objective([view], [], g).flatten().tolist() == [
        pytest.approx(view.square().sum().item()),
        float("inf"),
    ]
    assert grad_norm_objective([], [view], g).flatten().tolist() == [pytest.approx(view.square().sum().item()), 0.0]


def test_a_candidate_that_does_not_fit_is_refused(placed):
    view = placed("rows", 2, 8, 4, torch.float32).view
    with pytest.raises(ValueError, match="to fit the gradients"):
        grad_norm_objective([view], [view], torch.eye(7, device=view.device).expand(1, 2, 7, 7))
