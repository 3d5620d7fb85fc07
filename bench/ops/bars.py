"""The bars that compare an op with plain torch on one thread, each in one run: ratio, quartiles, and whether the bar holds.

python bench/ops/bars.py [--only gram_difference ...] [--rounds 15]

All routes of a case take turns; a ratio is the median over rounds of torch's CPU time over the op's, with its quartiles. The
streaming ops and teleport_adamw_ have bars against bytes a second: bench/ops/streaming.py prints those.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import bench_activation_action
import bench_gram_difference
import bench_group_action
import bench_matrix_exp
import torch

from teleport_fast.experiments.timing import Calls, clock, interleaved, ratios, spread
from teleport_fast.ops import activation_action, gram_difference, group_action_, matrix_exp
from teleport_fast.ops.backend import availability, set_backend


class Case(NamedTuple):
    """One row: torch's call, the op's, the ratio that the bar asks for."""

    op: str
    label: str
    by_torch: Callable[[], object]
    by_us: Callable[[], object]
    bar: float


def gram_differences() -> Iterator[Case]:
    for shape in bench_gram_difference.SHAPES:
        for layout in bench_gram_difference.LAYOUTS:
            plus, minus = (bench_gram_difference.gradient(*shape, layout) for _ in range(2))
            yield Case(
                "gram_difference", f"{'x'.join(map(str, shape))} {layout}",
                lambda plus=plus, minus=minus: bench_gram_difference.by_torch(plus, minus),
                lambda plus=plus, minus=minus: gram_difference(plus, minus), 1.5,
            )  # fmt: skip


def exponentials() -> Iterator[Case]:
    for batch, h in ((10000, 2), (1024, 8), (256, 16), (256, 32), (256, 64)):
        for norm in (0.1, 1.0, 10.0):
            M = bench_matrix_exp.matrices(batch, h, norm)
            yield Case(
                "matrix_exp", f"{batch}x{h} norm {norm}",
                lambda M=M: torch.linalg.matrix_exp(M), lambda M=M: matrix_exp(M), 5.0 if h <= 32 else 2.0,
            )  # fmt: skip


def group_actions() -> Iterator[Case]:
    for shape in bench_group_action.SHAPES:
        plus, minus = bench_group_action.joint(*shape)
        g = bench_group_action.rotation(*shape[:2])
        yield Case(
            "group_action_", "x".join(map(str, shape)),
            lambda plus=plus, minus=minus, g=g: bench_group_action.by_torch(plus, minus, g),
            lambda plus=plus, minus=minus, g=g: group_action_(plus, minus, g, g), 1.5,
        )  # fmt: skip


def activations() -> Iterator[Case]:
    # At most 1.3 times the bare product.
    Z, g = bench_activation_action.inputs(512, 512)
    yield Case("activation_action", "512x512", lambda: torch.mm(g, Z), lambda: activation_action(Z, g, 0.1), 1 / 1.3)


BARS = {"gram_difference": gram_differences, "matrix_exp": exponentials, "group_action_": group_actions, "activation_action": activations}


def measure(case: Case, rounds: int) -> tuple[float, float, float]:
    """Quartiles of torch's time over the op's; a short case gets more rounds, 0.2 s of them at most."""
    calls: Calls = {"torch": case.by_torch, "us": case.by_us}
    start = clock()
    interleaved(calls, 1)
    rounds = max(rounds, min(10 * rounds, int(0.4 / (clock() - start))))
    found = spread(ratios(interleaved(calls, rounds), "us", "torch"))
    return found["low"], found["median"], found["high"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(BARS), choices=list(BARS))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if availability("cpp") is not True:
        parser.error(str(availability("cpp")))
    print(f"One thread, {torch.ops.teleport_fast_cpp.isa()}, torch {torch.__version__}; torch's time over the op's, median [quartiles]\n")
    print("| op, float32 | case | ratio | bar | holds |\n| --- | --- | --- | --- | --- |")
    with set_backend("cpp"), torch.no_grad():
        for name in options.only:
            for case in BARS[name]():
                low, middle, high = measure(case, options.rounds)
                holds = "yes" if middle >= case.bar else "no"
                print(f"| {case.op} | {case.label} | {middle:.2f} [{low:.2f}, {high:.2f}] | {case.bar:.2f} | {holds} |", flush=True)


if __name__ == "__main__":
    main()
