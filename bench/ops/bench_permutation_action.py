"""permutation_action_ against torch's gather and copy, over 300 tensors of 276 MB together.

pytest bench/ops/bench_permutation_action.py --benchmark-group-by=param:layout; bench/ops/streaming.py prints the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from bench_square_sums import SIZES, buckets
from streaming import weights

from teleport_fast.ops import permutation_action_
from teleport_fast.ops.backend import availability, set_backend

__all__ = ["OP", "SIZES", "cases"]

OP = "permutation_action_"
LAYOUTS = ["rows", "columns"]


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`."""
    index = torch.randperm(size)[None]
    for label, tensors in buckets(size, dtype):
        yield label, lambda tensors=tensors: permutation_action_(tensors, index)


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
        benchmark(permutation_action_, weights(flat, 300, layout), torch.randperm(256)[None])
