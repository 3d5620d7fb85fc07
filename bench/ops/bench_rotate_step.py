"""rotate_step_ against torch's route: bmm, foreach Adam in the turned basis, bmm.

pytest bench/ops/bench_rotate_step.py --benchmark-group-by=param:bucket; python bench/ops/bench_rotate_step.py prints ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.experiments.timing import compare, interleaved
from teleport_fast.ops import rotate_step_
from teleport_fast.ops.backend import availability, set_backend

OP = "rotate_step_"
SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
SIDES = ("left", "right", "both")
LAYOUTS = ("rows", "columns")


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(shape))[0].contiguous()


def bucket(
    count: int, heads: int, h: int, n: int, sides: str, layout: str = "rows", dtype: torch.dtype = torch.float32
) -> tuple[list[list[Tensor]], list[list[Tensor] | None]]:
    """Parameters, gradients and moments of a bucket, moments laid out as the parameters, with their bases."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(kind: torch.dtype) -> Tensor:
        if layout == "rows":
            return torch.rand(heads, h, n).to(kind)
        return torch.rand(n, heads, h).to(kind).permute(1, 2, 0)

    lists = [[tensor(kind) for _ in range(count)] for kind in (dtype, dtype, wide, wide)]
    left = [orthogonal(heads, h, h).to(wide)] * count if sides in ("left", "both") else None
    right = [orthogonal(n, n).to(wide)] * count if sides in ("right", "both") else None
    return lists, [left, right]


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest where the wider of the turned sides is `size`."""
    # Without a turn the width is 1.
    for sides in ("none", *SIDES) if size == 1 else SIDES:
        for layout in LAYOUTS:
            # One side of a wide matrix, or both of a square one; heads as attention has them up to 128.
            other = size if sides == "both" else max(64, min(4 * size, 1024))
            h, n = {"right": (other, size), "none": (256, 256)}.get(sides, (size, other))
            heads = max(1, min(4, 256 // h)) if sides == "left" else 1
            count = max(1, min(8, (1 << 19) // (heads * h * n)))
            lists, turns = bucket(count, heads, h, n, sides, layout, dtype)
            label = f"{count}x{heads}x{h}x{n} {sides} {layout}"
            yield label, lambda lists=lists, turns=turns: rotate_step_(*lists, *turns, step=9, lr=1e-6)


def by_torch(lists: list[list[Tensor]], turns: list[list[Tensor] | None]) -> None:
    """The bucket's fastest plain form: one batched product per side and way, foreach in between."""
    parameters, gradients, m, v = lists
    left, right = turns
    G = torch.stack(gradients)
    if left:
        L = torch.stack(left)
        G = L @ G
    if right:
        R = torch.stack(right).unsqueeze(1)
        G = G @ R.mT
    turned = list(G.unbind())
    torch._foreach_lerp_(m, turned, 0.1)
    torch._foreach_mul_(v, 0.98)
    torch._foreach_addcmul_(v, turned, turned, 0.02)
    denominators = torch._foreach_sqrt(v)
    torch._foreach_div_(denominators, (1 - 0.98**9) ** 0.5)
    torch._foreach_add_(denominators, 1e-8)
    U = torch.stack(torch._foreach_div(m, denominators))
    if right:
        U = U @ R
    if left:
        U = L.mT @ U
    torch._foreach_mul_(parameters, 1.0)
    torch._foreach_add_(parameters, list(U.unbind()), alpha=-1e-6 / (1 - 0.9**9))


BUCKETS: dict[str, tuple[int, int, int, int, str, str]] = {
    f"{label} {layout}": (*shape, sides, layout)
    for label, shape, sides in (
        ("left d 64", (8, 1, 64, 256), "left"),
        ("left d 128", (8, 1, 128, 512), "left"),
        ("left d 256", (6, 1, 256, 1024), "left"),
        ("left d 512", (4, 1, 512, 1024), "left"),
        ("right d 64", (8, 1, 256, 64), "right"),
        ("right d 128", (8, 1, 512, 128), "right"),
        ("right d 256", (6, 1, 1024, 256), "right"),
        ("right d 512", (4, 1, 1024, 512), "right"),
        ("heads 32 and stream 128", (16, 4, 32, 128), "both"),
        ("both d 64", (8, 1, 64, 64), "both"),
        ("both d 128", (8, 1, 128, 128), "both"),
        ("both d 256", (4, 1, 256, 256), "both"),
        ("both d 512", (2, 1, 512, 512), "both"),
    )
    for layout in LAYOUTS
}


@pytest.mark.parametrize("route", ["torch", "reference", "cpp"])
@pytest.mark.parametrize("name", list(BUCKETS))
def bench_rotate_step(benchmark: Any, name: str, route: str) -> None:
    lists, turns = bucket(*BUCKETS[name])
    if route == "torch":
        benchmark(by_torch, lists, turns)
        return
    if availability(route) is not True:
        pytest.skip(str(availability(route)))
    with set_backend(route):
        benchmark(rotate_step_, *lists, *turns, step=9, lr=1e-6)


def main(rounds: int = 9) -> None:
    """Interleaved rounds on one thread by its CPU time: medians of the ratios to the torch route, with quartiles."""
    torch.set_num_threads(1)
    print("| bucket | torch ms | its time over reference's | over cpp's |")
    print("| --- | --- | --- | --- |")
    for name, shape in BUCKETS.items():
        lists, turns = bucket(*shape)

        def ours(backend: str, lists: Any = lists, turns: Any = turns) -> None:
            with set_backend(backend):
                rotate_step_(*lists, *turns, step=9, lr=1e-6)

        routes: dict[str, Callable[[], object]] = {
            "torch": lambda lists=lists, turns=turns: by_torch(lists, turns),
            "reference": lambda ours=ours: ours("reference"),
            "cpp": lambda ours=ours: ours("cpp"),
        }
        seconds = interleaved(routes, rounds)
        ratios = [compare(seconds, route, "torch") for route in ("reference", "cpp")]
        print(f"| {name} | {1e3 * statistics.median(seconds['torch']):.2f} | {ratios[0]} | {ratios[1]} |", flush=True)


if __name__ == "__main__":
    main()
