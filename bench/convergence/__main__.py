"""Tunes and compares the arms of a task; rows, tables and pictures go to a folder, and a second call goes on where one ended.

    python -m bench.convergence TASK [--arms ...] [--seeds ...] [--quick] [--out FOLDER]

TASK: factorisation, scaled-start, digits-mlp, digits-cnn, digits-vit, gpt, lora, or one variant of these; several may be named.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from bench.convergence.interface import RATES, TRIALS
from bench.convergence.protocol import run
from bench.convergence.report import write
from bench.convergence.store import Store
from bench.convergence.tasks import variants
from teleport_fast.experiments.arguments import numbers

QUICK_SEEDS, QUICK_TUNING = (0, 1), (100,)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.convergence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="+")
    parser.add_argument("--arms", help="separated by commas, the baseline first: optimizers, or one with additions (adamw,adamw+rotations)")
    parser.add_argument("--seeds", help="of the comparison, such as 0,1,2,3,4")
    parser.add_argument("--tuning-seeds", help="others, such as 100,101")
    parser.add_argument("--trials", type=int, default=TRIALS, help=f"an arm's trials on each tuning seed ({TRIALS})")
    parser.add_argument("--shares", help="train the best trials for these shares of the steps too, such as 0.5,0.625,0.74")
    parser.add_argument("--quick", action="store_true", help="a few steps, two seeds: does everything run?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    options = parser.parse_args(arguments)
    command = "python -m bench.convergence " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(options.threads)
    try:
        for name in options.task:
            for task in variants(name, options.quick):
                task.arms = tuple(options.arms.split(",")) if options.arms else task.arms
                seeds = numbers("seeds", options.seeds, int) if options.seeds else QUICK_SEEDS if options.quick else task.seeds
                tuning = QUICK_TUNING if options.quick else task.tuning_seeds
                tuning = numbers("tuning-seeds", options.tuning_seeds, int) if options.tuning_seeds else tuning
                trials = RATES if options.quick else options.trials
                shares = numbers("shares", options.shares, float) if options.shares else ()
                store = Store(options.out / f"{task.name}.jsonl", task)
                outcome = run(task, task.arms, store, seeds, tuning, trials, shares, lambda line: print(line, flush=True))
                print(write(outcome, options.out, command, seeds, tuning))
    except (ValueError, ModuleNotFoundError) as error:
        print(f"bench.convergence: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bench.convergence: interrupted; the same command goes on from the rows in {options.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
