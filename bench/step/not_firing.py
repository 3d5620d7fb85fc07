"""What a teleporter adds to a step at which its schedule does not fire, in microseconds of CPU time of one thread.

    python bench/step/not_firing.py [--rounds 400] [--json]

A round times one step of the base alone and one of the same base with a teleporter that never fires, on the same parameters, one after
the other and in turns first; the figure is the median of the pairs' differences, with quartiles. The base is what `--base` names; models
are the chain of four 4 x 4 layers and the demo's GPT, where the base itself takes long. The bar is 20 microseconds.
`eigenbasis` is left out of the bar: it takes up the gradient's covariance at every step, by design; its row says what that costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.experiments.timing import seconds
from teleport_fast.symmetry import GeneralLinear

BAR = 20.0
WARM_UP = 20
BASES: dict[str, Callable[..., Any]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-9),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=1e-9, fused=True),
}
OBJECTIVES = ("grad_norm", "balance", "random", "eigenbasis")


def models() -> dict[str, tuple[nn.Module, tf.Symmetries]]:
    chain = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    views = (tf.View("0.weight", 0, 1, 4),), (tf.View("1.weight", 1, 1, 4),)
    joint = tf.Joint("joint", "chain", GeneralLinear(4), 1, 4, *views)
    rotation = tf.Joint("rotation", "chain", tf.symmetry.Orthogonal(4), 1, 4, (tf.View("2.weight", 0, 1, 4),), (tf.View("3.weight", 1, 1, 4),))
    gpt = GPT(GPTConfig(d_model=32, layers=2, heads=2, context=16))
    return {
        "chain, 4 matrices": (chain, tf.Symmetries((joint, rotation), model=chain)),
        "gpt, 15 tensors": (gpt, tf.find_symmetries(gpt)),
    }


def measure(base: str, rounds: int) -> dict[str, dict[str, float]]:
    """{model and objective: median, low and high of the difference in microseconds, and the base's own}."""
    rows = {}
    for name, (model, symmetries) in models().items():
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for objective in OBJECTIVES:
            plain, teleported = (BASES[base](model.parameters()) for _ in range(2))
            tf.attach(teleported, symmetries, objective, tf.At())
            differences, alone = [], []
            for turn in range(rounds + WARM_UP):
                both = (plain, teleported) if turn % 2 == 0 else (teleported, plain)
                times = {id(optimizer): 1e6 * seconds(optimizer.step) for optimizer in both}
                alone.append(times[id(plain)])
                differences.append(times[id(teleported)] - times[id(plain)])
            low, median, high = statistics.quantiles(differences[WARM_UP:], n=4)
            rows[f"{name}, {objective}"] = {
                "median": median, "low": low, "high": high, "base": statistics.median(alone[WARM_UP:])
            }  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="sgd")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.base, options.rounds)
    if options.json:
        print(json.dumps({"base": options.base, "rounds": options.rounds, "rows": rows}, indent=1))
    else:
        print(f"microseconds on top of a step of {options.base}, when nothing fires:")
        for row, r in rows.items():
            print(f"  {row:32} {r['median']:7.1f}  ({r['low']:.1f} to {r['high']:.1f}; the base alone takes {r['base']:.0f})")
    return int(any(r["median"] > BAR for row, r in rows.items() if not row.endswith("eigenbasis")))


if __name__ == "__main__":
    raise SystemExit(main())
