"""Peak memory of a step beside the base's, as a share of the parameters, between teleports and at one.

    python bench/step/peak_memory.py [--d-model 128] [--layers 4] [--json]

What torch's allocator had given out at once during one step of AdamW (for-loop and foreach) on the demo's GPT, by torch.profiler, less the
same of the base alone.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.experiments.memory import peak

OBJECTIVES = ("grad_norm", "grad_l1", "balance", "random", "eigenbasis")


def measure(config: GPTConfig) -> dict[str, dict[str, float]]:
    """{row: what a step adds to the base's peak, in percent of the parameters, between teleports and at one}."""
    torch.manual_seed(0)
    model = GPT(config)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    symmetries = tf.find_symmetries(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(256, (2, config.context + 1))
    firing = [False]

    def backward() -> None:
        model.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()

    rows = {}
    for foreach in (False, True):
        base = 0
        for objective in (None, *OBJECTIVES):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=foreach)
            if objective is not None:
                tf.attach(optimizer, symmetries, objective, tf.When(lambda info: firing[0]))
            peaks = []
            for firing[0] in (False, False, True):
                backward()
                peaks.append(peak(optimizer.step))
            if objective is None:
                base = peaks[1]
                continue
            row = f"{objective}, {'foreach' if foreach else 'for-loop'}"
            rows[row] = {name: 100 * (p - base) / size for name, p in zip(("between", "at a teleport"), peaks[1:], strict=True)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(GPTConfig(d_model=options.d_model, layers=options.layers, context=16))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("percent of the parameters on top of the base's peak:")
    for row, found in rows.items():
        print(f"  {row:24} " + ", ".join(f"{name} {share:.1f}" for name, share in found.items()))


if __name__ == "__main__":
    main()
