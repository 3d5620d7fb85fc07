"""activation_action against the bare product and against plain torch (σ, product, σ⁻¹ one after the other).

pytest bench/ops/bench_activation_action.py --benchmark-group-by=param:shape
python bench/ops/bench_activation_action.py [--threads 1] [--rounds 15]: the bar, ratios to torch.mm by rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.experiments.timing import compare, interleaved
from teleport_fast.ops import activation_action
from teleport_fast.ops.backend import availability, set_backend

OP = "activation_action"
SIZES = (1, 4, 16, 64, 128, 256, 512, 1024)
# (h, B)
SHAPES = [(16, 512), (64, 512), (128, 512), (256, 256), (512, 512), (1024, 1024)]


def inputs(h: int, B: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Preactivations and an element near the identity."""
    g = torch.eye(h) + 0.3 * torch.randn(h, h) / h**0.5
    return torch.randn(h, B).to(dtype), g.double() if dtype == torch.float64 else g


def cases_of(op: Callable[..., object], size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`: few columns and many, and a layer's transpose."""
    many = max(64, min(4096, (1 << 18) // size))
    for B in dict.fromkeys((64, min(many, 512), many)):
        Z, g = inputs(size, B, dtype)
        yield f"{size}x{B} columns", lambda Z=Z, g=g: op(Z, g, 0.1)
    rows = inputs(size, 256, dtype)[0].mT.contiguous().mT
    yield f"{size}x256 rows", lambda: op(rows, g, 0.1)


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    yield from cases_of(activation_action, size, dtype)


@pytest.mark.parametrize("route", ["mm", "reference", "cpp"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_activation_action(benchmark: Any, shape: tuple[int, int], route: str) -> None:
    Z, g = inputs(*shape)
    if route == "mm":
        benchmark(torch.mm, g, Z)
        return
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    with set_backend(route):
        benchmark(activation_action, Z, g, 0.1)


def with_backend(name: str, Z: Tensor, g: Tensor) -> Callable[[], object]:
    def call() -> object:
        with set_backend(name):
            return activation_action(Z, g, 0.1)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| h x B | time of cpp over torch.mm: median [quartiles] | of reference over torch.mm |\n| --- | --- | --- |")
    for h, B in SHAPES:
        Z, g = inputs(h, B)
        calls = {"mm": lambda g=g, Z=Z: torch.mm(g, Z)}
        calls |= {name: with_backend(name, Z, g) for name in ("reference", "cpp")}
        seconds = interleaved(calls, options.rounds)
        ratios = [compare(seconds, "mm", name) for name in ("cpp", "reference")]
        print(f"| {h} x {B} | {ratios[0]} | {ratios[1]} |", flush=True)


if __name__ == "__main__":
    main()
