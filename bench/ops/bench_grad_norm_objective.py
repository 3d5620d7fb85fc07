"""grad_norm_objective against plain torch: one group element, and a line search of eight that shares the Grams.

pytest bench/ops/bench_grad_norm_objective.py --benchmark-group-by=param:shape
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import grad_norm_objective
from teleport_fast.ops.backend import availability, set_backend

OP = "grad_norm_objective"
SIZES = (4, 8, 16, 32, 64, 128, 256)
# (candidates, heads, h, n)
SHAPES = [(1, 16, 32, 128), (8, 16, 32, 128), (8, 12, 64, 768), (8, 4, 128, 512)]


def inputs(
    candidates: int, heads: int, h: int, n: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a producer and a consumer, and elements near the identity."""
    plus, minus = torch.randn(heads, h, n).to(dtype), torch.randn(n, heads, h).to(dtype).permute(1, 2, 0)
    g = torch.eye(h) + 0.1 * torch.randn(candidates, heads, h, h) / h**0.5
    return plus, minus, g.double() if dtype == torch.float64 else g


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`."""
    for candidates in (1, 8):
        shape = (candidates, max(1, min(16, 512 // size)), size, 4 * size)
        arguments = inputs(*shape, dtype)
        yield "x".join(map(str, shape)), lambda arguments=arguments: grad_norm_objective(*arguments)


@pytest.mark.parametrize("route", ["reference", "cpp"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_grad_norm_objective(benchmark: Any, shape: tuple[int, int, int, int], route: str) -> None:
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    with set_backend(route):
        benchmark(grad_norm_objective, *inputs(*shape))
