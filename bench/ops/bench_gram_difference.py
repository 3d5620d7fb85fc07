"""gram_difference against two torch.bmm and a subtraction.

pytest bench/ops/bench_gram_difference.py --benchmark-group-by=param:shape,param:layout
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import gram_difference
from teleport_fast.ops.backend import availability, set_backend

OP = "gram_difference"
BY_LAYOUT = True
SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = [
    (12, 16, 768),
    (96, 16, 4096),
    (12, 32, 1024),
    (96, 32, 2048),
    (12, 64, 768),
    (32, 64, 2048),
    (12, 128, 768),
    (16, 128, 4096),
]
LAYOUTS = ["rows", "columns"]


def gradient(heads: int, h: int, n: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A linear layer's gradient: `rows` where it writes the joint, `columns` where it reads it."""
    if layout == "rows":
        return torch.randn(heads, h, n).to(dtype)
    return torch.randn(n, heads, h).to(dtype).permute(1, 2, 0)


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`: about the same work each, and the bar's smaller shapes."""
    n = 4096 if size <= 32 else 2048
    heads = max(1, min(256, (1 << 25) // (size * size * n)))
    for shape in ((heads, size, n), *(s for s in SHAPES if s[1] == size and s[0] == 12)):
        for layout in LAYOUTS:
            plus, minus = gradient(*shape, layout, dtype), gradient(*shape, layout, dtype)
            yield f"{'x'.join(map(str, shape))} {layout}", lambda plus=plus, minus=minus: gram_difference(plus, minus)


def by_torch(plus: Tensor, minus: Tensor) -> Tensor:
    return torch.bmm(minus, minus.mT) - torch.bmm(plus, plus.mT)


@pytest.mark.parametrize("route", ["torch", "reference", "cpp"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_gram_difference(benchmark, shape, layout, route):
    plus, minus = gradient(*shape, layout), gradient(*shape, layout)
    if route == "torch":
        benchmark(by_torch, plus, minus)
        return
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    with set_backend(route):
        benchmark(gram_difference, plus, minus)
