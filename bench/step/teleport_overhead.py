"""What a teleport of all joints costs, as a share of one forward plus backward, in CPU time of one thread.

    python bench/step/teleport_overhead.py [--batch 16] [--rounds 15] [--d-model 128] [--layers 4] [--every 3] [--json]

Every round times one forward + backward of the demo model, one plain AdamW step, and for each objective one step whose
schedule does not fire (the covariance update, for rotations) and one whose schedule fires; a plain step is taken off both.
"every 3" is what an average step costs when one in three fires. Figures are medians of the per-round ratios with their
quartiles, so that a drifting clock cancels; CPU time by `time.thread_time`, so that other work on the machine hardly shows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.experiments.timing import seconds, spread
from teleport_fast.objectives import Eigenbasis

OBJECTIVES: dict[str, str | Callable[[], Eigenbasis]] = {
    "eigenbasis": "eigenbasis",
    "eigenbasis, parts=1": lambda: Eigenbasis(parts=1),
    "eigenbasis, takes='turns'": lambda: Eigenbasis(takes="turns"),
    **{name: name for name in ("random", "grad_norm", "grad_l1", "balance")},
}
WARM_UP = 3


class Switch:
    """A schedule condition that the benchmark turns on and off."""

    on = False

    def __call__(self, info: tf.StepInfo) -> bool:
        return self.on


def measure(config: GPTConfig, batch: int, rounds: int, every: int) -> dict[str, dict[str, float]]:
    """Ratios to forward + backward: {row: {median, low, high}}; `forward_backward_ms` is a row of its own."""
    torch.manual_seed(0)
    model = GPT(config)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    symmetries = tf.find_symmetries(model)
    ids = torch.randint(256, (batch, config.context + 1))
    plain = torch.optim.AdamW(model.parameters(), lr=0.0)
    arms = {}
    for name, objective in OBJECTIVES.items():
        switch, optimizer = Switch(), torch.optim.AdamW(model.parameters(), lr=0.0)
        chosen = objective if isinstance(objective, str) else objective()
        tf.attach(optimizer, symmetries, objective=chosen, schedule=tf.When(switch))
        arms[name] = (optimizer, switch)

    def backward() -> None:
        model.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()

    times: dict[str, list[float]] = {"forward_backward": [], "plain step": []}
    for _ in range(rounds + WARM_UP):
        times["forward_backward"].append(seconds(backward))
        times["plain step"].append(seconds(plain.step))
        for name, (optimizer, switch) in arms.items():
            for switch.on, row in ((False, f"{name}, not firing"), (True, f"{name}, teleport")):
                times.setdefault(row, []).append(seconds(optimizer.step) - times["plain step"][-1])
            spent = (every - 1) * times[f"{name}, not firing"][-1] + times[f"{name}, teleport"][-1]
            times.setdefault(f"{name}, every {every}", []).append(spent / every)
    base = times["forward_backward"][WARM_UP:]
    rows = {row: spread([x / b for x, b in zip(xs[WARM_UP:], base, strict=True)]) for row, xs in times.items()}
    rows["forward_backward_ms"] = spread([1e3 * b for b in base])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 128 tokens a step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--every", type=int, default=3, help="steps between teleports, for the average step")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = GPTConfig(d_model=options.d_model, layers=options.layers)
    rows = measure(config, options.batch, options.rounds, options.every)
    if options.json:
        print(json.dumps({**vars(options), "threads": torch.get_num_threads(), "rows": rows}, indent=1))
        return
    fb = rows.pop("forward_backward_ms")
    print(f"forward + backward, {options.batch} x 128 tokens: {fb['median']:.1f} ms ({fb['low']:.1f} to {fb['high']:.1f})")
    for row, r in rows.items():
        if row != "forward_backward":
            print(f"{row:38s} {100 * r['median']:6.1f}% ({100 * r['low']:.1f} to {100 * r['high']:.1f})")


if __name__ == "__main__":
    main()
