"""diagonal_action_ against torch's multiplications and against torch.clone, over 300 tensors of 276 MB together.

pytest bench/ops/bench_diagonal_action.py --benchmark-group-by=param:layout; bench/ops/streaming.py prints the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import diagonal_action_
from teleport_fast.ops.backend import availability, set_backend

OP = "diagonal_action_"
SIZES = (1, 4, 16, 64, 256, 1024, 4096)
LAYOUTS = ["rows", "columns"]


def views(flat: Tensor, count: int, layout: str) -> list[Tensor]:
    """`count` weights of 256 units × 900 in one piece of memory, as the joint that writes or reads them sees them."""
    if layout == "rows":
        return list(flat.view(count, 1, 256, 900))
    return [tensor.mT[None] for tensor in flat.view(count, 900, 256)]


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`: many weights, and one alone."""
    s = torch.ones(1, size)
    for count, n in ((24, max(1, (1 << 17) // size)), (1, 64)):
        rows = [torch.randn(1, size, n).to(dtype) for _ in range(count)]
        columns = [torch.randn(n, size).to(dtype).mT[None] for _ in range(count)]
        exponents = [1.0, -1.0] * (count // 2) or [1.0]
        yield f"{count}x{size}x{n} rows", lambda rows=rows, e=exponents: diagonal_action_(rows, s, e)
        yield f"{count}x{size}x{n} columns", lambda columns=columns, e=exponents: diagonal_action_(columns, s, e)


@pytest.mark.parametrize("route", ["clone", "reference", "cpp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def bench_diagonal_action(benchmark, layout, route):
    flat = torch.randn(300 * 256 * 900)
    if route == "clone":
        benchmark(flat.clone)
        return
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    with set_backend(route):
        benchmark(diagonal_action_, views(flat, 300, layout), torch.ones(1, 256), [1.0, -1.0] * 150)
