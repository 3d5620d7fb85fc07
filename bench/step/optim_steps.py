"""What a step of `tf.optim`'s optimizers costs, as a share of one forward plus backward, in CPU time of one thread.

    python bench/step/optim_steps.py [--batch 16] [--rounds 9] [--d-model 128] [--layers 4] [--json]

A round times one forward + backward of the demo's GPT and one period of every optimizer, step by step: AdamW; Rotated with three
steps between refreshes, with the hidden side in blocks of 64 (the default), without it, and with it whole; AdamW with exact
rotations every three steps; torch's Muon; AdamW with a diagonal teleport at every step, by `attach` and by `tf.optim.AdamW`.
Figures are medians over rounds of the ratio of a mean step, with quartiles. CPU time by `time.thread_time`, on one thread, so
that other work on the machine hardly shows.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F

import teleport_fast as tf
from teleport_fast.experiments.arms import arm_named, make_optimizer
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.experiments.timing import seconds, spread

WARM_UP = 2
PERIOD = 3


def optimizers(model: GPT) -> dict[str, Any]:
    """Name to optimizer; all at rate 0, so that every row sees the same weights."""
    symmetries = tf.find_symmetries(model)
    diagonal = symmetries.select(lambda joint: joint.group.form == "diagonal")
    names = ("adamw", "rotated", "rotated:hidden=false", "rotated-hidden", "muon")
    made: dict[str, Any] = {name: make_optimizer(arm_named(name), model, 0.1) for name in names}
    made["adamw + exact rotations, k = 3"] = torch.optim.AdamW(model.named_parameters(), lr=0.0)
    tf.attach(made["adamw + exact rotations, k = 3"], symmetries, objective="eigenbasis", schedule=tf.Every(3))
    made["adamw + diagonal teleport, attach"] = torch.optim.AdamW(model.named_parameters(), lr=0.0)
    tf.attach(made["adamw + diagonal teleport, attach"], diagonal, schedule=tf.Every(1), radius=1e-3)
    made["adamw + diagonal teleport, tf.optim.AdamW"] = tf.optim.AdamW(
        model.named_parameters(), lr=0.0, symmetries=diagonal, schedule=tf.Every(1), radius=1e-3
    )
    for optimizer in made.values():
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    return made


def measure(config: GPTConfig, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """{row: median, low and high of its share of forward + backward}; `forward_backward_ms` is a row of its own."""
    torch.manual_seed(0)
    model = GPT(config)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    ids = torch.randint(256, (batch, config.context + 1))

    def backward() -> None:
        model.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()

    backward()
    arms = optimizers(model)
    times: dict[str, list[float]] = {"forward_backward": []}
    for _ in range(rounds + WARM_UP):
        times["forward_backward"].append(seconds(backward))
        for name, optimizer in arms.items():
            times.setdefault(name, []).append(sum(seconds(optimizer.step) for _ in range(PERIOD)) / PERIOD)
    base = times["forward_backward"][WARM_UP:]
    rows = {name: spread([x / b for x, b in zip(xs[WARM_UP:], base, strict=True)]) for name, xs in times.items()}
    rows["forward_backward_ms"] = spread([1e3 * b for b in base])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(GPTConfig(d_model=arguments.d_model, layers=arguments.layers), arguments.batch, arguments.rounds)
    if arguments.json:
        print(json.dumps(rows))
        return
    milliseconds = rows.pop("forward_backward_ms")
    print(f"forward + backward: {milliseconds['median']:.0f} ms of CPU time; shares of it:")
    for name, row in rows.items():
        print(f"  {name:44} {100 * row['median']:6.1f} %  ({100 * row['low']:.1f} to {100 * row['high']:.1f})")


if __name__ == "__main__":
    main()
