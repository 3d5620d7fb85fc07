"""matrix_exp and matrix_exp_pair against torch.linalg.matrix_exp, at the widths of heads and the norms of a search.

pytest bench/ops/bench_matrix_exp.py --benchmark-group-by=param:shape
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import matrix_exp, matrix_exp_pair
from teleport_fast.ops.backend import availability, set_backend

OP = "matrix_exp"
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
# (batch, h, 1-norm)
SHAPES = [(10000, 2, 1.0), (1024, 8, 1.0), (256, 16, 1.0), (256, 32, 0.1), (256, 32, 1.0), (256, 32, 10.0), (256, 64, 1.0), (16, 128, 1.0)]


def matrices(batch: int, h: int, norm: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Symmetric ones, as a search along the Lie gradient takes them."""
    M = torch.randn(batch, h, h)
    M = M + M.mT
    return (M * (norm / M.abs().sum(1).amax(1))[:, None, None]).to(dtype)


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`, with about the same work each, and a batch of one."""
    for batch in (1, min(4096, max(1, (1 << 22) // size**3))):
        for norm in (0.125, 1.0, 10.0):
            M = matrices(batch, size, norm, dtype)
            yield f"{batch}x{size} norm {norm}", lambda M=M: matrix_exp(M)


@pytest.mark.parametrize("route", ["reference", "cpp"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}-norm{shape[2]}")
@pytest.mark.parametrize("fn", [matrix_exp, matrix_exp_pair])
def bench_matrix_exp(benchmark: Any, fn: Callable[[Tensor], object], shape: tuple[int, int, float], route: str) -> None:
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    with set_backend(route):
        benchmark(fn, matrices(*shape))
