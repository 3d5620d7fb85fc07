"""square_sums against the plain sums of torch and against torch.clone, over 300 tensors of 276 MB together.

pytest bench/ops/bench_square_sums.py --benchmark-group-by=param:layout; bench/ops/streaming.py prints the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from streaming import weights
from torch import Tensor

from teleport_fast.ops import square_sums
from teleport_fast.ops.backend import availability, set_backend

OP = "square_sums"
SIZES = (1, 4, 16, 64, 256, 1024, 4096)
LAYOUTS = ["rows", "columns", "heads", "convolution"]


def buckets(size: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    """Many weights, and one alone, at width `size`, as the joint that writes or reads them sees them."""
    for count, n in ((24, max(1, (1 << 17) // size)), (1, 64)):
        rows = [torch.randn(1, size, n).to(dtype) for _ in range(count)]
        columns = [torch.randn(n, size).to(dtype).mT[None] for _ in range(count)]
        yield f"{count}x{size}x{n} rows", rows
        yield f"{count}x{size}x{n} columns", columns


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`."""
    for label, tensors in buckets(size, dtype):
        yield label, lambda tensors=tensors: square_sums(tensors)


@pytest.mark.parametrize("route", ["clone", "reference", "cpp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def bench_square_sums(benchmark, layout, route):
    flat = torch.randn(300 * 256 * 900)
    if route == "clone":
        benchmark(flat.clone)
        return
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    with set_backend(route):
        benchmark(square_sums, weights(flat, 300, layout))
