"""covariance_ against the plain torch loop: one layer of the residual stream, and the demo model's buckets.

pytest bench/ops/bench_covariance.py --benchmark-group-by=param:bucket
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import covariance_
from teleport_fast.ops.backend import availability, set_backend

OP = "covariance_"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def stream(width: int, layers: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor], int]:
    """The residual stream: in every layer o and down write it, q, k, v and up read it (transposed views)."""
    tensors = []
    for _ in range(layers):
        tensors += [torch.randn(1, width, n).to(dtype) for n in (width, 4 * width)]
        tensors += [torch.randn(1, n, width).to(dtype).mT for n in (width, width, width, 4 * width)]
    return _covariance(1, width, dtype), tensors, 1


def heads(width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor], int]:
    """Four joints of a value and an output projection each, four heads."""
    tensors = []
    for _ in range(4):
        tensors.append(torch.randn(4, width, 4 * width).to(dtype))
        tensors.append(torch.randn(4 * width, 4, width).to(dtype).permute(1, 2, 0))
    return _covariance(16, width, dtype), tensors, 4


def _covariance(count: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(count, width, width, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`."""
    for label, (covariance, tensors, joints) in (("stream", stream(size, 1, dtype)), ("heads", heads(min(size, 128), dtype))):
        yield label, lambda c=covariance, t=tensors, j=joints: covariance_(c, t, 0.95, j)


BUCKETS: dict[str, Callable[[], tuple[Tensor, list[Tensor], int]]] = {
    "demo stream, 24 tensors of h 128": lambda: stream(128, 4),
    "demo heads, 4x4 of h 32": lambda: heads(32),
    "stream bfloat16": lambda: stream(128, 4, torch.bfloat16),
}


@pytest.mark.parametrize("route", ["reference", "cpp"])
@pytest.mark.parametrize("bucket", list(BUCKETS))
def bench_covariance(benchmark: Any, bucket: str, route: str) -> None:
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    covariance, tensors, joints = BUCKETS[bucket]()
    with set_backend(route):
        benchmark(covariance_, covariance, tensors, 0.95, joints)
