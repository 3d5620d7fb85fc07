"""grad_norm_objective.cu against float64: odd widths, pivots, singular candidates, one side alone, bits, traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def elements(candidates: int, heads: int, h: int, dtype: torch.dtype) -> Tensor:
    noise = torch.randn(candidates, heads, h, h, dtype=dtype) / max(1, h) ** 0.5
    return torch.eye(h, dtype=dtype) + 0.3 * noise


def grams(heads: int, h: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """−S₊ and S₋, symmetric to the bit."""
    G = torch.randn(2, heads, h, 40, dtype=dtype)
    S = G @ G.mT
    S = (S + S.mT) / 2
    return -S[0].contiguous(), S[1].contiguous()


def formula(minus_gram_plus: Tensor, gram_minus: Tensor, g: Tensor) -> Tensor:
    inverse = torch.linalg.inv(g)
    return ((inverse @ inverse.mT) * -minus_gram_plus + (g.mT @ g) * gram_minus).sum((-1, -2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("h", [1, 3, 7, 8, 31, 63, 64, 65, 96])
def test_the_objective_matches_float64_at_every_width(kernels: Any, dtype: torch.dtype, h: int) -> None:
    candidates, heads = (3, 2) if h < 60 else (1, 1)
    plus, minus = grams(heads, h, dtype)
    g = elements(candidates, heads, h, dtype)
    J = kernels.grad_norm_objective(plus, minus, g)
    true, theirs = formula(plus.double(), minus.double(), g.double()), formula(plus, minus, g)
    # float64 has no better reference than torch itself: units of the elimination's length instead
    unit = torch.finfo(dtype).eps * (4 + h if dtype == torch.float64 else 4)
    assert ((J.double() - true).abs() <= 2 * (theirs.double() - true).abs().max() + unit * true).all()


@pytest.mark.parametrize("sizes", [(0, 2, 5), (2, 0, 5), (3, 2, 0)])
def test_nothing_to_do_is_done(kernels: Any, sizes: tuple[int, int, int]) -> None:
    candidates, heads, h = sizes
    J = kernels.grad_norm_objective(*grams(heads, h, torch.float32), elements(*sizes, torch.float32))
    assert torch.equal(J, torch.zeros(candidates, heads))


def test_wider_than_shared_memory_is_refused(kernels: Any) -> None:
    for h, dtype in ((141, torch.float32), (100, torch.float64)):
        with pytest.raises(RuntimeError, match="returned -1"):
            kernels.grad_norm_objective(*grams(1, h, dtype), elements(1, 1, h, dtype))


def test_one_side_may_be_missing(kernels: Any) -> None:
    plus, minus = grams(2, 9, torch.float32)
    g, none = elements(2, 2, 9, torch.float32), torch.zeros(2, 9, 9)
    torch.testing.assert_close(kernels.grad_norm_objective(plus, None, g), formula(plus, none, g))
    torch.testing.assert_close(kernels.grad_norm_objective(None, minus, g), formula(none, minus, g))


def test_zeros_on_the_diagonal_are_no_trouble_and_the_wrong_element_is_noticed(kernels: Any) -> None:
    plus, minus = grams(1, 6, torch.float32)
    g = torch.eye(6)[torch.tensor([3, 0, 5, 1, 2, 4])][None, None] * torch.linspace(0.5, 2, 6)
    J = kernels.grad_norm_objective(plus, minus, g)
    torch.testing.assert_close(J, formula(plus, minus, g))
    # negative control: J is no function of gᵀ
    assert not torch.allclose(kernels.grad_norm_objective(plus, minus, g.mT.contiguous()), J, rtol=1e-2)


def test_singular_candidates_give_infinity_and_others_stay(kernels: Any) -> None:
    plus, minus = grams(1, 5, torch.float32)
    g = elements(3, 1, 5, torch.float32)
    g[0] = 0
    g[1, 0, :, 3] = 0
    J = kernels.grad_norm_objective(plus, minus, g)
    assert J[:2].isposinf().all()
    torch.testing.assert_close(J[2:], formula(plus, minus, g[2:]))
    assert kernels.grad_norm_objective(None, minus, g).isfinite().all()


def test_a_nan_stays_visible(kernels: Any) -> None:
    plus, minus = grams(1, 5, torch.float32)
    g = elements(1, 1, 5, torch.float32)
    g[0, 0, 2, 2] = torch.nan
    assert kernels.grad_norm_objective(plus, minus, g).isnan().all()


def test_the_result_has_the_same_bits_under_every_order(kernels: Any) -> None:
    (plus, minus), g, results = grams(2, 21, torch.float32), elements(2, 2, 21, torch.float32), []
    for seed in range(3):
        kernels.emulator.seed = seed
        results.append(kernels.grad_norm_objective(plus, minus, g))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_each_matrix_is_read_once_per_candidate(kernels: Any) -> None:
    plus, minus = grams(2, 32, torch.float32)
    g = elements(3, 2, 32, torch.float32)
    kernels.grad_norm_objective(plus, minus, g)
    traffic = kernels.emulator.traffic()
    assert traffic.bytes == g.nbytes + 3 * (plus.nbytes + minus.nbytes) + 4 * 6
    assert traffic.sector_ratio <= 1.1, traffic
