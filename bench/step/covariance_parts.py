"""What it costs in loss that a covariance takes up one of several runs of a gradient's columns at a step.

    python bench/step/covariance_parts.py [--parts 1,3] [--seeds 0,1,2] [--steps 160] [--rate 0.0045]

Trains the demo's GPT by `Rotated` once per seed and number of parts, on the same batches; a line of JSON per run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch

from teleport_fast.experiments import arms
from teleport_fast.experiments.text import read_text
from teleport_fast.experiments.train import Setting, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="1,3")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rate", type=float, default=0.0045)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text, base = read_text(), arms.BASES["rotated"]
    for seed in map(int, arguments.seeds.split(",")):
        for parts in map(int, arguments.parts.split(",")):
            arms.BASES["parts"] = replace(base, options={**base.options, "covariance_parts": parts})
            run = train(arms.Arm("parts", "parts"), arguments.rate, seed, Setting(steps=arguments.steps), text)
            loss = run.validation[-1][1] if run.validation else None
            print(json.dumps({"parts": parts, "seed": seed, "validation": loss}), flush=True)


if __name__ == "__main__":
    main()
