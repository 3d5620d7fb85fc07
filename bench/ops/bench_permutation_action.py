"""permutation_action_ against torch's gather and copy, over 300 tensors of 276 MB together.

pytest bench/ops/bench_permutation_action.py --benchmark-group-by=param:layout; bench/ops/streaming.py prints the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import permutation_action_
from teleport_fast.ops.backend import availability, set_backend

OP = "permutation_action_"
SIZES = (1, 4, 16, 64, 256, 1024, 4096)
LAYOUTS = ["rows", "columns"]


def views(flat: Tensor, count: int, layout: str) -> list[Tensor]:
    """`count` weights of 256 units × 900 in one piece of memory, as the joint that writes or reads them sees them."""
    if layout == "rows":
        return list(flat.view(count, 1, 256, 900))
    return [tensor.mT[None] for tensor in flat.view(count, 900, 256)]


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`: many weights, and one alone."""
    index = torch.randperm(size)[None]
    for count, n in ((24, max(1, (1 << 17) // size)), (1, 64)):
        rows = [torch.randn(1, size, n).to(dtype) for _ in range(count)]
        columns = [torch.randn(n, size).to(dtype).mT[None] for _ in range(count)]
        yield f"{count}x{size}x{n} rows", lambda rows=rows: permutation_action_(rows, index)
        yield f"{count}x{size}x{n} columns", lambda columns=columns: permutation_action_(columns, index)


@pytest.mark.parametrize("route", ["clone", "reference", "cpp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def bench_permutation_action(benchmark, layout, route):
    flat = torch.randn(300 * 256 * 900)
    if route == "clone":
        benchmark(flat.clone)
        return
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    with set_backend(route):
        benchmark(permutation_action_, views(flat, 300, layout), torch.randperm(256)[None])
