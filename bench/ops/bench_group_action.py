"""group_action_ against gather, bmm, scatter.

pytest bench/ops/bench_group_action.py --benchmark-group-by=param:shape
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import group_action_
from teleport_fast.ops.backend import availability, set_backend

OP = "group_action_"
BY_LAYOUT = True
SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Attention of (heads, d_head, d_model), the last one the residual stream of a small model.
SHAPES = [
    (12, 16, 768),
    (32, 32, 1024),
    (12, 64, 768),
    (32, 64, 2048),
    (16, 128, 2048),
    (32, 128, 4096),
    (1, 256, 1024),
]


def joint(heads: int, h: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Value and output weight of attention with gradients and momenta: strided head views of (d, d) matrices."""
    writers = [torch.randn(heads * h, n).to(dtype).view(heads, h, n) for _ in range(3)]
    readers = [torch.randn(n, heads * h).to(dtype).view(n, heads, h).permute(1, 2, 0) for _ in range(3)]
    return [writers[0], *readers[1:]], [readers[0], *writers[1:]]


def rotation(heads: int, h: int) -> Tensor:
    """Orthogonal, so that repeated moves neither grow nor vanish."""
    return torch.linalg.qr(torch.randn(heads, h, h))[0].contiguous()


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`, with about the same work each."""
    n = 2048
    heads = max(1, min(256, (1 << 24) // (size * size * n)))
    plus, minus = joint(heads, size, n, dtype)
    g = rotation(heads, size).to(torch.float64 if dtype == torch.float64 else torch.float32)
    writers, readers = [plus[0], *minus[1:]], [minus[0], *plus[1:]]
    yield f"{heads}x{size}x{n} rows", lambda: group_action_(writers, [], g)
    yield f"{heads}x{size}x{n} columns", lambda: group_action_(readers, [], g)


def by_torch(plus: list[Tensor], minus: list[Tensor], g: Tensor) -> None:
    for tensor in (*plus, *minus):
        tensor.copy_(torch.bmm(g, tensor.contiguous()))


@pytest.mark.parametrize("route", ["torch", "reference", "cpp"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_group_action(benchmark, shape, route):
    plus, minus = joint(*shape)
    g = rotation(*shape[:2])
    if route == "torch":
        benchmark(by_torch, plus, minus, g)
        return
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    with set_backend(route):
        benchmark(group_action_, plus, minus, g, g)
