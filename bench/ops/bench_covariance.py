"""covariance_ against plain torch: the buckets of the demo model, and one wide joint per width.

pytest bench/ops/bench_covariance.py times both with pytest-benchmark; as a script,

    python bench/ops/bench_covariance.py [--rounds 30] [--threads 1]

interleaves the two in one run and prints the median of the per-round ratios torch/cpp with its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import covariance_
from teleport_fast.ops.backend import set_backend


def stream(width: int = 128, layers: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor], int]:
    """The residual stream's bucket: per layer q, k, v, up read it (transposed views), o and down write it."""
    tensors = []
    for _ in range(layers):
        tensors += [torch.randn(1, width, n, dtype=dtype) for n in (width, 4 * width)]
        tensors += [torch.randn(1, n, width, dtype=dtype).mT for n in (width, width, width, 4 * width)]
    return torch.zeros(1, width, width, dtype=dtype), tensors, 1


def heads(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor], int]:
    """The heads' bucket: four joints, each with a value and an output projection of four heads of width 32."""
    tensors = []
    for _ in range(4):
        tensors += [torch.randn(4, 32, 128, dtype=dtype), torch.randn(128, 4, 32, dtype=dtype).permute(1, 2, 0)]
    return torch.zeros(16, 32, 32, dtype=dtype), tensors, 4


def wide(width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor], int]:
    return stream(width, 1, dtype)


CASES: dict[str, Any] = {
    "demo stream 24 tensors h=128": stream,
    "demo heads 4x4 h=32": heads,
    "demo stream bfloat16": lambda: _as(stream(), torch.bfloat16),
    **{f"one layer h={width}": lambda width=width: wide(width) for width in (8, 64, 256, 512, 1024)},
    "one layer h=128 float64": lambda: wide(128, torch.float64),
}


def _as(case: tuple[Tensor, list[Tensor], int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], int]:
    covariance, tensors, joints = case
    return covariance, [tensor.to(dtype) for tensor in tensors], joints


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", list(CASES))
def bench_covariance(benchmark: Any, case: str, backend: str) -> None:
    covariance, tensors, joints = CASES[case]()
    benchmark.group = case
    with set_backend(backend):
        benchmark(covariance_, covariance, tensors, 0.95, joints)


def _seconds(backend: str, covariance: Tensor, tensors: list[Tensor], joints: int) -> float:
    with set_backend(backend):
        start = time.perf_counter()
        covariance_(covariance, tensors, 0.95, joints)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, make in CASES.items():
        case = make()
        rounds = [tuple(_seconds(backend, *case) for backend in ("reference", "cpp")) for _ in range(options.rounds + 3)][3:]
        low, median, high = statistics.quantiles([theirs / ours for theirs, ours in rounds], n=4)
        theirs, ours = (1e3 * statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:30s} torch {theirs:8.3f} ms  cpp {ours:8.3f} ms  {median:6.2f}x ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
