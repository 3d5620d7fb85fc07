"""matrix_exp.cu against exact exponentials: every norm, odd widths, pairs, NaN, blocks of several matrices, bits, traffic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# Around the norms at which the number of squarings changes, and far beyond.
NORMS = [0.0, 1e-6, 1e-3, 0.04, 0.06, 0.5, 0.7, 1.5, 5.0, 20.0]


def draw(h: int, symmetric: bool, norms: list[float] = NORMS) -> Tensor:
    M = torch.randn(len(norms), h, h, dtype=torch.float64)
    M = M + M.mT if symmetric else M
    return M * (torch.tensor(norms, dtype=torch.float64) / M.abs().sum(-2).amax(-1))[:, None, None]


def exact_exp(M: Tensor) -> np.ndarray:
    """Scaling to norm 2⁻⁶, 16 terms and squaring, in extended precision (64 bits)."""
    A = M.double().numpy().astype(np.longdouble)
    times = max(0, int(np.ceil(np.log2(max(float(np.abs(A).sum(-2).max()), 1e-9) * 64))))
    A = A / np.longdouble(2) ** times
    eye = np.eye(A.shape[-1], dtype=np.longdouble)
    X = np.zeros_like(A) + eye
    for k in range(16, 0, -1):
        X = eye + A @ X / k
    for _ in range(times):
        X = X @ X
    return X


def error_of(result: Tensor, truth: np.ndarray) -> np.ndarray:
    difference = result.double().numpy().astype(np.longdouble) - truth
    return np.sqrt((difference**2).sum((-1, -2)) / (truth**2).sum((-1, -2))).astype(float)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("h", [1, 2, 3, 7, 8, 9, 17, 31])
def test_the_error_is_at_most_twice_torchs_own(kernels: Any, h: int, symmetric: bool, dtype: torch.dtype) -> None:
    check(kernels, draw(h, symmetric).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("h", [63, 64])
def test_the_error_is_at_most_twice_torchs_own_on_wide_matrices(kernels: Any, h: int, dtype: torch.dtype) -> None:
    check(kernels, draw(h, h == 64, [0.9, 3.0]).to(dtype))


def check(kernels: Any, M: Tensor) -> None:
    results = kernels.matrix_exp(M, pair=True)
    # two roundings of the result, and of M, which move exp(M) by up to ‖M‖ of them
    floor = 2 * torch.finfo(M.dtype).eps * M.double().abs().sum(-2).amax(-1).clamp(min=1).numpy()
    for ours, argument in zip(results, (M, -M), strict=True):
        truth = exact_exp(argument)
        error, allowed = error_of(ours, truth), 2 * error_of(torch.linalg.matrix_exp(argument), truth) + floor
        assert (error <= allowed).all(), error / allowed


def test_the_pair_holds_the_bits_of_two_single_ones(kernels: Any) -> None:
    M = draw(6, False).float()
    plus, minus = kernels.matrix_exp(M, pair=True)
    assert torch.equal(plus, kernels.matrix_exp(M)[0])
    assert torch.equal(minus, kernels.matrix_exp(-M)[0])
    # negative control: the second is no copy of the first
    assert not torch.allclose(plus, minus)


@pytest.mark.parametrize("h", [1, 2, 5, 12])
def test_neighbours_in_a_block_do_not_touch_each_other(kernels: Any, h: int) -> None:
    M = torch.randn(37, h, h) * torch.logspace(-3, 1, 37)[:, None, None]
    together = kernels.matrix_exp(M, pair=True)
    for index in (0, 17, 36):
        alone = kernels.matrix_exp(M[index : index + 1].clone(), pair=True)
        assert all(torch.equal(a[0], b[index]) for a, b in zip(alone, together, strict=True))


def test_a_nan_or_an_infinity_spoils_its_own_matrix_only(kernels: Any) -> None:
    for h in (1, 4):
        M = torch.randn(5, h, h)
        whole = kernels.matrix_exp(M)[0]
        M[1, 0, 0], M[3, h - 1, 0] = torch.nan, -torch.inf
        for result in kernels.matrix_exp(M, pair=True):
            assert result[[1, 3]].isnan().all() and result[[0, 2, 4]].isfinite().all()
        assert torch.equal(kernels.matrix_exp(M)[0][::2], whole[::2])


@pytest.mark.parametrize("shape", [(0, 3, 3), (4, 0, 0)])
def test_nothing_to_do_is_done(kernels: Any, shape: tuple[int, int, int]) -> None:
    assert kernels.matrix_exp(torch.empty(shape))[0].shape == shape


def test_what_does_not_fit_is_refused(kernels: Any) -> None:
    for M, limit in ((torch.zeros(1, 65, 65), 227 << 10), (torch.zeros(1, 64, 64).double(), 99 << 10)):
        with pytest.raises(RuntimeError, match="returned -1"):
            kernels.matrix_exp(M, shared_limit=limit)


def test_the_result_has_the_same_bits_under_every_order(kernels: Any) -> None:
    M, results = torch.randn(9, 10, 10), []
    for seed in range(3):
        kernels.emulator.seed = seed
        results.append(torch.stack(kernels.matrix_exp(M, pair=True)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_traffic_is_the_minimum_and_coalesced(kernels: Any) -> None:
    for batch, h in ((4, 32), (64, 4)):
        M = torch.randn(batch, h, h) / h
        kernels.matrix_exp(M, pair=True)
        traffic = kernels.emulator.traffic()
        assert traffic.bytes == 3 * M.nbytes
        assert traffic.sector_ratio <= 1.1, traffic
