"""The simulator's counts with this machine's own rates, beside the shares that `bench/step/optim_steps.py` measures in the same run.

    python -m bench.scale.measured [--rounds 5]

One thread, by its CPU time: a product's rate, a copy's, and how long a step of orthogonal iteration takes at each width are measured;
nothing is fitted. The base optimizer's measured share is added to what the simulator counts beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.scale.costs import ROTATIONS, Method, at_refresh, bases, every_step
from bench.scale.shapes import Shape, decoder
from bench.step.optim_steps import measure
from teleport_fast.experiments.gpt import GPTConfig
from teleport_fast.ops import orthogonal_iteration_

SIZES = {"0.9M": (128, 4), "4M": (256, 5)}
BATCH = 16
METHODS = {
    "adamw + exact rotations, k = 3": Method(ROTATIONS, every=3, parts=4),
    "rotated:hidden=false": Method("Rotated", every=3, parts=1, hidden=False),
    "rotated": Method("Rotated", every=3, parts=1),
    "rotated-hidden": Method("Rotated", every=3, parts=1, hidden=True),
}


@dataclass
class Rates:
    """Flops a second of a product as large as a matrix of the model, bytes a second of a copy, seconds of an iteration by width."""

    products: float
    copied: float
    iterations: dict[int, float] = field(default_factory=dict)

    @classmethod
    def here(cls, width: int) -> Rates:
        wide, square, block = torch.randn(4 * width, width), torch.randn(width, width), torch.randn(4_000_000)
        into = torch.empty_like(block)
        flops = 2 * wide.numel() * width
        return cls(flops / _seconds(lambda: wide @ square), 2 * block.nbytes / _seconds(lambda: into.copy_(block)))

    def iteration(self, width: int) -> float:
        """Seconds of one basis' step, of sixteen at a time."""
        if width not in self.iterations:
            root = torch.randn(16, width, width)
            covariance, basis = root @ root.mT, torch.eye(width).repeat(16, 1, 1)
            self.iterations[width] = _seconds(lambda: orthogonal_iteration_(basis, covariance)) / 16
        return self.iterations[width]


def demo(width: int, layers: int) -> Shape:
    return decoder(
        "demo", "", width=width, layers=layers, heads=4, inner=4 * width, vocab=256, tokens=BATCH * 128, context=128,
        gated=False, rotary=False, positions=128, gains=False,
    )  # fmt: skip


def predicted(shape: Shape, method: Method, rates: Rates) -> float:
    """Seconds of the average step, beside the base optimizer's own."""
    step, refresh = every_step(shape, method), at_refresh(shape, method)
    if method.name == ROTATIONS:
        made = [(joint.heads, joint.width, joint.count) for joint in shape.joints if joint.turns]
    else:
        made = list(bases(shape, method))
    iterations = sum(heads * count * rates.iteration(width) for heads, width, count in made)
    products = step.products + refresh.products / method.every
    streamed = step.streamed + refresh.streamed / method.every
    return products / rates.products + streamed / rates.copied + iterations / method.every


def _seconds(work: Callable[[], object], rounds: int = 9) -> float:
    times = []
    for _ in range(rounds + 2):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| | simulated | measured |\n| --- | --- | --- |")
    for name, (width, layers) in SIZES.items():
        shape, rates = demo(width, layers), Rates.here(width)
        seconds = {row: predicted(shape, method, rates) for row, method in METHODS.items()}
        rows = measure(GPTConfig(d_model=width, layers=layers), BATCH, arguments.rounds)
        whole = rows["forward_backward_ms"]["median"] / 1e3
        for row in METHODS:
            share = rows["adamw"]["median"] + seconds[row] / whole
            median, low, high = (100 * rows[row][key] for key in ("median", "low", "high"))
            print(f"| {name}, {row} | {100 * share:.1f} % | {median:.1f} % ({low:.1f} to {high:.1f}) |")
        print(f"| {name}: products {rates.products / 1e9:.0f} GFLOP/s, forward and backward "
              f"{shape.flops_per_token * shape.tokens / whole / 1e9:.0f}, a copy {rates.copied / 1e9:.1f} GB/s | | |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
