"""matrix_exp and matrix_exp_pair against torch.linalg.matrix_exp, at the widths of heads and the norms of a search.

pytest bench/ops/bench_matrix_exp.py times all with pytest-benchmark; as a script,

    python bench/ops/bench_matrix_exp.py [--rounds 15] [--threads 1]

interleaves ours and torch's in one run and prints the median of the per-round ratios torch/ours with its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import matrix_exp, matrix_exp_pair
from teleport_fast.ops.backend import set_backend

# (batch, h, 1-norm, dtype)
CASES = [
    *((batch, h, 1.0, torch.float32) for batch, h in ((10000, 2), (2048, 4), (1024, 8), (256, 16), (256, 32), (256, 64), (16, 128))),
    *((256, 32, norm, torch.float32) for norm in (0.1, 10.0)),
    *((batch, h, 1.0, torch.float64) for batch, h in ((10000, 2), (256, 32), (256, 64), (16, 128))),
    (12, 64, 0.125, torch.float32),
    (4, 256, 1.0, torch.float32),
]
PAIRS = [(12, 32, 0.125, torch.float32), (256, 32, 1.0, torch.float32)]


def matrices(batch: int, h: int, norm: float, dtype: torch.dtype) -> Tensor:
    """Symmetric ones, as a search along the Lie gradient takes them."""
    M = torch.randn(batch, h, h, dtype=dtype)
    M = M + M.mT
    return M * (norm / M.abs().sum(1).amax(1))[:, None, None]


def _torch_pair(M: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(torch.stack((M, -M)))


@pytest.mark.parametrize("who", ["torch", "cpp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_matrix_exp(benchmark: Any, case: tuple[int, int, float, torch.dtype], who: str) -> None:
    benchmark.group = str(case)
    with set_backend("reference" if who == "torch" else "cpp"):
        benchmark(matrix_exp, matrices(*case))


def compare(theirs: Callable[[Tensor], object], ours: Callable[[Tensor], object], M: Tensor, rounds: int) -> tuple[list[float], float, float]:
    """Quartiles of the per-round ratios and both medians in ms."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        theirs(M)
        middle = time.perf_counter()
        ours(M)
        times.append((middle - start, time.perf_counter() - middle))
    times = times[2:]
    ratios = statistics.quantiles([a / b for a, b in times], n=4)
    return ratios, 1e3 * statistics.median(a for a, _ in times), 1e3 * statistics.median(b for _, b in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with set_backend("cpp"):
        for cases, name, theirs, ours in (
            (CASES, "exp", torch.linalg.matrix_exp, matrix_exp),
            (PAIRS, "pair", _torch_pair, matrix_exp_pair),
        ):
            for batch, h, norm, dtype in cases:
                (low, median, high), a, b = compare(theirs, ours, matrices(batch, h, norm, dtype), options.rounds)
                label = f"{name} {batch}x{h} norm {norm} {str(dtype).removeprefix('torch.')}"
                print(f"{label:36s} torch {a:9.3f} ms  cpp {b:8.3f} ms  {median:6.2f}x ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
