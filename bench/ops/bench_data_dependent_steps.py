"""data_dependent_steps_, ten steps: one fused call against the loop of torch operators that it stands for.

OMP_NUM_THREADS=1 pytest bench/ops/bench_data_dependent_steps.py --benchmark-group-by=param:shape
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from teleport_fast.data_dependent import CrossEntropy
from teleport_fast.data_dependent.activation import leaky_relu
from teleport_fast.data_dependent.network import Network
from teleport_fast.data_dependent.published_loop import published_v_exact
from teleport_fast.ops.backend import availability, set_backend

# Widths and batch. From a square matrix on, the published loop leaves its start quickly: there lr is smaller.
SHAPES = [((20, 8, 6, 3), 30), ((784, 16, 10, 10), 200), ((3072, 128, 32, 10), 200), ((300, 256, 256, 10), 1000), ((400, 256, 256, 10), 256)]


@pytest.mark.parametrize("route", ["reference", "cpp"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape[0])) + f"-batch{shape[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def bench_data_dependent_steps(benchmark: Any, shape: tuple[tuple[int, ...], int], route: str, dtype: torch.dtype) -> None:
    """Under "reference" published_v_exact runs its own loop, which is many times faster than the op's plain reference."""
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    widths, batch = shape
    weights = [torch.randn(b, a, dtype=dtype) / a**0.5 for a, b in itertools.pairwise(widths)]
    X, loss = torch.randn(widths[0], batch, dtype=dtype), CrossEntropy(torch.randint(widths[-1], (batch,)))
    net = Network(weights[0] @ X, weights[1:], X.mT @ X, leaky_relu(0.1))
    with set_backend(route):
        benchmark(published_v_exact, net, loss, 10, 1e-7 if batch in widths else 1e-4, math.inf, 1)
