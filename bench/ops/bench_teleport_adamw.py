"""teleport_adamw_ against torch's AdamW(fused=True) alone, and against moving and stepping apart.

pytest bench/ops/bench_teleport_adamw.py; bench/ops/streaming.py prints the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import teleport_adamw_
from teleport_fast.ops.backend import availability, set_backend

OP = "teleport_adamw_"
SIZES = (1, 4, 16, 64, 256, 1024, 4096)


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`: many weights, and one alone."""
    s = torch.ones(1, size)
    for count, n in ((24, max(1, (1 << 16) // size)), (1, 64)):
        rows = [[torch.rand(1, size, n).to(dtype) for _ in range(count)] for _ in range(4)]
        columns = [[torch.rand(n, size).to(dtype).mT[None] for _ in range(count)] for _ in range(4)]
        exponents = [1.0, -1.0] * (count // 2) or [1.0]
        yield f"{count}x{size}x{n} rows", lambda r=rows, e=exponents: teleport_adamw_(*r, s, e, step=2, lr=1e-6)
        yield f"{count}x{size}x{n} columns", lambda c=columns, e=exponents: teleport_adamw_(*c, s, e, step=2, lr=1e-6)


def model(count: int) -> list[Tensor]:
    parameters = [torch.nn.Parameter(torch.randn((256, 900) if i % 2 else (900, 256))) for i in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


@pytest.mark.parametrize("route", ["torch's AdamW alone", "reference", "cpp"])
def bench_teleport_adamw(benchmark, route):
    parameters = model(60)
    if route == "torch's AdamW alone":
        benchmark(torch.optim.AdamW(parameters, fused=True).step)
        return
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    lists = [[torch.rand(t.shape) for t in parameters] for _ in range(4)]
    lists = [[t[None] if i % 2 else t.mT[None] for i, t in enumerate(tensors)] for tensors in lists]
    with set_backend(route):
        benchmark(lambda: teleport_adamw_(*lists, torch.ones(1, 256), [-1.0, 1.0] * 30, step=2))
