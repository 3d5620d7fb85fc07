"""What one step costs by each optimizer and teleport, over forward plus backward of the same model, and the memory it takes.

    python -m bench.peers [--quick] [--only MODEL ...] [--rounds 5] [--out FILE]

One thread by its CPU time; forward plus backward and all arms take turns in an order of the round, rates are 0 and weights are put
back, so that all work on the same numbers. A cost is the median over rounds with quartiles; an optimizer that works every few steps is
charged its mean over a whole period, a teleport by itself its whole call. Memory by torch's allocator: what stays out after a period
(the state), and the most that is out at once during one, over the parameters' bytes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.peers.arms import GPT_ARMS, MLP_ARMS, Arm
from bench.peers.models import Workload, gpt, mlp
from bench.ratios.measure import machine, rounded
from teleport_fast.data_dependent import RankWarning
from teleport_fast.experiments.gpt import GPTConfig
from teleport_fast.experiments.memory import peak, usage
from teleport_fast.experiments.report import write_json
from teleport_fast.experiments.timing import Calls, interleaved, ratios, spread

BASE = "forward + backward"


def measure(work: Workload, arms: Sequence[Arm], rounds: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row per arm: cost over forward plus backward, state and peak over the parameters."""
    work.backward()
    calls: Calls = {BASE: work.backward}
    memory = {BASE: (0, peak(work.backward))}
    for arm in arms:
        held: list[Callable[[], object]] = []

        def first(arm: Arm = arm, held: list[Callable[[], object]] = held) -> None:
            held.append(arm.make(work))
            held[0]()

        _ = work.symmetries  # found before: no arm's memory
        with work.kept():
            state = 0 if arm.once else usage(first)[1]
            if arm.once:
                first()
        with work.kept():
            memory[arm.name] = state, peak(held[0])
        calls[arm.name] = held[0]
    steps = {arm.name: arm.steps for arm in arms}

    def around(name: str) -> AbstractContextManager[Any]:
        return nullcontext() if name == BASE else work.kept()

    found = interleaved(calls, rounds, around=around)
    rows = []
    for name in calls:
        cost = ratios(found, BASE, name, 1 / steps.get(name, 1))
        state, most = (value / work.bytes for value in memory[name])
        row = {
            "model": work.name, "parameters": sum(p.numel() for p in work.parameters), "arm": name, "rounds": rounds,
            "cost": rounded(spread(cost)), "state": float(f"{max(0.0, state):.3g}"), "peak": float(f"{most:.3g}"),
        }  # fmt: skip
        rows.append(row)
        tell(f"{work.name}: {name:40} {row['cost']['median']:8.3f} of forward + backward, state {state:.2f}, peak {most:.2f}")
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds: does everything run?")
    parser.add_argument("--only", nargs="*", choices=("gpt", "mlp"), help="these; the others stay as --out has them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/peers.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # The batch exceeds the MLP's widths on purpose: the loop's cost is measured, not its exactness.
    warnings.simplefilter("ignore", RankWarning)
    rounds = 2 if options.quick else options.rounds
    config, batch = (GPTConfig(d_model=32, layers=1, heads=2, context=16), 2) if options.quick else (GPTConfig(), 8)
    widths, images = ((30, 16, 10, 10), 25) if options.quick else ((784, 128, 32, 10), 200)
    command = "python -m bench.peers " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    found: dict[str, Any] = {"command": command.strip(), "machine": machine(), "rows": []}
    if options.only and options.out.exists():
        before = json.loads(options.out.read_text())
        found["rows"] = [row for row in before["rows"] if row["model"].split()[0].strip(",").lower() not in options.only]
        found["command"] = "; ".join(dict.fromkeys([*before["command"].split("; "), found["command"]]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, make, arms in (("gpt", lambda: gpt(config, batch), GPT_ARMS), ("mlp", lambda: mlp(widths, images), MLP_ARMS)):
        if not options.only or name in options.only:
            found["rows"] += measure(make(), arms, rounds, lambda line: print(line, flush=True))
            # A model at a time: a run that is stopped keeps what it has measured.
            write_json(found, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
