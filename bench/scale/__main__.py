"""Costs of teleports and rotated steps for 7B, 70B and a 600B mixture on 8 to 4,096 GPUs: docs/scale.md's tables.

    python -m bench.scale [--machine H100] [--model 7B] [--tf32] [--tokens 4194304] [--every 3,10,100] [--training 0.4] ...
    python -m bench.scale --write          puts the tables of both precisions into docs/scale.md

Counts come from shapes (tested against the library), rates from public figures, and the shares of these that are reached are
assumptions with an option each. Nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from bench.scale.machines import MACHINES, Reached
from bench.scale.report import page, tables, written
from bench.scale.shapes import MODELS
from bench.scale.simulate import GPUS, Setting

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "scale.md"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in MODELS]
    parser.add_argument("--machine", choices=MACHINES, default="H100")
    parser.add_argument("--model", choices=names, action="append", help="all of them by default")
    parser.add_argument("--gpus", type=numbers, default=GPUS)
    parser.add_argument("--every", type=numbers, default=(3, 10, 100), help="steps between refreshes of the exact rotations")
    parser.add_argument("--tokens", type=int, help="of a step, all GPUs together (each model's own)")
    parser.add_argument("--tf32", action="store_true", help="the optimizer's products in TF32 instead of float32")
    for field in fields(Reached):
        parser.add_argument(f"--{field.name}", type=float, default=field.default, help=f"assumed, {field.default} by default")
    parser.add_argument("--write", action="store_true", help="write docs/scale.md's tables")
    options = parser.parse_args(arguments)
    try:
        reached = Reached(**{field.name: getattr(options, field.name) for field in fields(Reached)})
    except ValueError as error:
        print(f"bench.scale: {error}", file=sys.stderr)
        return 2
    if options.write:
        PAGE.write_text(written(PAGE.read_text(), page()))
        return 0
    chosen = [model for model in MODELS if options.model is None or model.name in options.model]
    setting = Setting(MACHINES[options.machine], reached, options.tf32, options.tokens)
    print("\n\n".join(tables(model, setting, options.gpus, options.every) for model in chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
