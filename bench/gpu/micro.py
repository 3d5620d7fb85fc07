"""Times on the device, by its own events: each backend, plain torch, a copy of as many bytes and the BLAS, taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from check import fresh
from problems import Problem, problems

from teleport_fast.ops.backend import set_backend

# (heads, h, n): a head of a small model, of a large one, and a wide joint.
SIZES = ((12, 64, 768), (32, 128, 4096), (96, 64, 4096))
QUICK = ((4, 16, 64),)


def copies_beyond_cache(problem: Problem, device: torch.device) -> int:
    """Sets of inputs to go through in turn, so that none is still in the second-level cache from its last call."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20
    bytes_of_one = sum(t.numel() * t.element_size() for t in problem.inputs)
    return max(2, min(64, 3 * cache // max(1, bytes_of_one) + 1))


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def with_backend(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with set_backend(name):
            call()

    return run


def rounds_of(
    problem: Problem,
    backends: Sequence[str],
    device: torch.device,
    rounds: int,
    time: Callable[[Callable[[], object]], float],
) -> dict[str, list[float]]:
    """Milliseconds by route; the routes take turns and the inputs rotate."""
    sets = [fresh(problem.inputs) for _ in range(copies_beyond_cache(problem, device))]
    source = torch.empty(max(1, problem.bytes // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    heads, h, n = (int(part) for part in problem.label.split(" x "))
    left, right = torch.randn(heads, h, h, device=device), torch.randn(heads, h, n, device=device)
    turn = [0]

    def op() -> None:
        turn[0] = (turn[0] + 1) % len(sets)
        problem.call(*sets[turn[0]])

    routes: dict[str, Callable[[], object]] = {
        "torch": with_backend("reference", op),
        **{name: with_backend(name, op) for name in backends},
        "copy of as many bytes": lambda: target.copy_(source),
        "one float32 product of its shape": lambda: torch.bmm(left, right),
    }
    times: dict[str, list[float]] = {name: [] for name in routes}
    for number in range(rounds + 3):
        for name, route in routes.items():
            try:
                milliseconds = time(route)
            except RuntimeError as reason:
                if "cannot compute" not in str(reason):
                    raise
                continue
            # The first three rounds compile and warm up.
            if number > 2:
                times[name].append(milliseconds)
    return times


def measure(
    backends: Sequence[str], device: torch.device, rounds: int, quick: bool, time: Callable[[Callable[[], object]], float] = timed
) -> list[str]:
    """A markdown table of medians with quartiles, float32 and bfloat16."""
    rows = [
        "Medians and quartiles of interleaved rounds; inputs rotate through more than the second-level cache.",
        "",
        "| op | dtype | size | route | µs | over torch | GB/s of the least bytes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for size in QUICK if quick else SIZES:
            for problem in problems(dtype, device, *size):
                times = rounds_of(problem, backends, device, rounds, time)
                torch_median = statistics.median(times["torch"])
                for route, milliseconds in times.items():
                    if len(milliseconds) < 2:
                        rows.append(f"| {problem.op} | {dtype} | {problem.label} | {route} | no kernel | | |")
                        continue
                    low, middle, high = statistics.quantiles(milliseconds, n=4)
                    bandwidth = f"{problem.bytes / middle / 1e6:.0f}" if "product" not in route else ""
                    rows.append(
                        f"| {problem.op} | {str(dtype).removeprefix('torch.')} | {problem.label} | {route} | "
                        f"{1e3 * middle:.1f} [{1e3 * low:.1f}, {1e3 * high:.1f}] | {torch_median / middle:.2f} | {bandwidth} |"
                    )
    return rows
