"""diagonal_action_ against torch's multiplications and against torch.clone, over 300 tensors of 276 MB together.

pytest bench/ops/bench_diagonal_action.py --benchmark-group-by=param:layout; bench/ops/streaming.py prints the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from bench_square_sums import SIZES, buckets
from streaming import weights

from teleport_fast.ops import diagonal_action_
from teleport_fast.ops.backend import availability, set_backend

__all__ = ["OP", "SIZES", "cases"]

OP = "diagonal_action_"
LAYOUTS = ["rows", "columns"]


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`."""
    s = torch.ones(1, size)
    for label, tensors in buckets(size, dtype):
        exponents = [1.0, -1.0] * (len(tensors) // 2) or [1.0]
        yield label, lambda t=tensors, e=exponents: diagonal_action_(t, s, e)


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
        benchmark(diagonal_action_, weights(flat, 300, layout), torch.ones(1, 256), [1.0, -1.0] * 150)
