"""orthogonal_iteration_ against torch's QR: a warm basis alone, and a head's bases in one call.

pytest bench/ops/bench_orthogonal_iteration.py --benchmark-group-by=param:h
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import orthogonal_iteration_
from teleport_fast.ops.backend import availability, set_backend

OP = "orthogonal_iteration_"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def warm(heads: int, h: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A basis, and a covariance of which it is nearly an eigenbasis."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    basis = torch.linalg.qr(torch.randn(heads, h, h, dtype=wide))[0].contiguous()
    noise = 0.01 * torch.randn(heads, h, h, dtype=wide)
    eigen = basis + noise @ basis
    return basis, eigen.mT @ (torch.logspace(0, -2, h, dtype=wide)[:, None] * eigen)


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`."""
    for heads in (1, 4):
        basis, covariance = warm(heads, size, dtype)
        yield f"{heads} heads", lambda b=basis, c=covariance: orthogonal_iteration_(b, c)


@pytest.mark.parametrize("route", ["reference", "cpp"])
@pytest.mark.parametrize("h", [32, 128, 512])
def bench_orthogonal_iteration(benchmark: Any, h: int, route: str) -> None:
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    basis, covariance = warm(4, h)
    with set_backend(route):
        benchmark(orthogonal_iteration_, basis, covariance)
