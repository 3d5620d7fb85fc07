"""How time and memory of a teleport and of find_symmetries grow with parameters, joints, heads and width, on the CPU.

    python -m bench.growth [--quick] [--only SWEEP ...] [--rounds 3] [--out FILE] [--plot FILE]

GPTs of the demo's kind, 256 tokens, one thread by its CPU time. Times are multiples of forward plus backward of the same model, medians
of interleaved rounds; growth is the exponent of a straight line through the logarithms of what is swept and of the time itself (over
the sweep's first). Memory: the most that torch's allocator has out at once in a call (for a teleport, in its step of AdamW with
`foreach=False`), over the parameters. `parameters` are 1M, 10M and 100M:
under --quick and where --largest says less, the largest are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import teleport_fast as tf
from bench.growth.picture import draw
from bench.peers.models import gpt
from bench.ratios.measure import machine, rounded
from teleport_fast.experiments.gpt import GPTConfig
from teleport_fast.experiments.memory import peak
from teleport_fast.experiments.report import write_json
from teleport_fast.experiments.timing import Calls, interleaved, ratios, spread

CONTEXT, BATCH = 128, 2
# Above so many parameters a round takes a minute: one of them, and no warm-up but the first call.
ONE_ROUND = 50_000_000
# (d_model, layers, heads) by what is swept; its value is what the growth is over.
SWEEPS: dict[str, dict[int, tuple[int, int, int]]] = {
    "width": {d: (d, 2, 4) for d in (64, 128, 256, 512)},
    "heads": {heads: (256, 2, heads) for heads in (1, 2, 4, 8, 16)},
    "layers": {layers: (128, layers, 4) for layers in (1, 2, 4, 8, 16)},
    "parameters": {1_000_000: (128, 4, 4), 10_000_000: (384, 6, 6), 100_000_000: (768, 14, 12)},
}
QUICK = {name: {value: (32 * (i + 1), 1, 2) for i, value in enumerate(list(sizes)[:2])} for name, sizes in SWEEPS.items()}
WORK = ("find_symmetries", "rotations", "grad_norm", "AdamW")
Row = dict[str, Any]


def measure(sweep: str, value: int, size: tuple[int, int, int], rounds: int) -> tuple[Row, dict[str, float]]:
    """A row of ratios, and each work's median time, of which only quotients are kept."""
    d, layers, heads = size
    work = gpt(GPTConfig(d_model=d, layers=layers, heads=heads, context=CONTEXT), BATCH)
    work.backward()
    parameters = sum(p.numel() for p in work.parameters)
    held: list[tf.Symmetries] = []
    memory = {"find_symmetries": peak(lambda: held.append(tf.find_symmetries(work.model)))}
    symmetries = held[0]
    plain = torch.optim.AdamW(work.parameters, lr=0.0, foreach=False)
    plain.step()
    calls: Calls = {"forward + backward": work.backward, "find_symmetries": lambda: tf.find_symmetries(work.model), "AdamW": plain.step}
    memory["AdamW"] = peak(plain.step)
    for name, objective in (("rotations", "eigenbasis"), ("grad_norm", "grad_norm")):
        radius = None if name == "rotations" else 0.01
        # on AdamW's state: a teleport moves moments too
        optimizer = torch.optim.AdamW(work.parameters, lr=0.0, foreach=False)
        optimizer.state = plain.state
        tf.attach(optimizer, symmetries, objective, tf.When(lambda info: True), radius=radius)
        optimizer.step()
        memory[name] = peak(optimizer.step)
        calls[name] = optimizer.step
    single = parameters > ONE_ROUND
    found = interleaved(calls, 1 if single else rounds, warm_up=0 if single else 1)
    for name in ("rotations", "grad_norm"):
        # the teleport alone
        found[name] = [max(a - b, 1e-9) for a, b in zip(found[name], found["AdamW"], strict=True)]
    row = {
        "sweep": sweep, "value": value, "parameters": parameters, "joints": len(symmetries.joints), "layers": layers, "heads": heads,
        "width": d, "rounds": len(found["AdamW"]),
        "time": {name: rounded(spread(ratios(found, "forward + backward", name))) for name in WORK},
        "memory": {name: float(f"{memory[name] / work.bytes:.3g}") for name in WORK},
    }  # fmt: skip
    return row, {name: statistics.median(found[name]) for name in (*WORK, "forward + backward")}


def exponent(values: list[float], times: list[float]) -> float:
    """Slope of log time over log value.

    >>> round(exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    return statistics.linear_regression([math.log(v) for v in values], [math.log(t) for t in times]).slope


def run(sweeps: dict[str, dict[int, tuple[int, int, int]]], rounds: int, largest: int, tell: Callable[[str], None]) -> Iterator[Row]:
    """Rows of each sweep, and after them its exponents."""
    for sweep, sizes in sweeps.items():
        rows: list[Row] = []
        times: list[dict[str, float]] = []
        for value, size in sizes.items():
            if sweep == "parameters" and value > largest:
                continue
            row, spent = measure(sweep, value, size, rounds)
            rows.append(row)
            times.append(spent)
            row["over_first"] = {name: float(f"{spent[name] / times[0][name]:.4g}") for name in spent}
            shown = ", ".join(f"{name} {row['time'][name]['median']:.2f}" for name in WORK)
            tell(f"{sweep} {value}: {row['parameters'] / 1e6:.2f}M, {row['joints']} joints; {shown} of forward + backward")
            yield row
            gc.collect()
        if len(rows) > 1:
            values = [float(row["parameters"] if sweep == "parameters" else row["value"]) for row in rows]
            slopes = {name: round(exponent(values, [spent[name] for spent in times]), 2) for name in times[0]}
            memory = {
                name: round(exponent(values, [max(1e-6, row["memory"][name]) * row["parameters"] for row in rows]), 2) for name in WORK
            }
            tell(f"{sweep}: time grows with exponents {slopes}, memory {memory}")
            yield {"sweep": sweep, "exponents": slopes, "memory_exponents": memory}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, two a sweep: does everything run?")
    parser.add_argument("--only", nargs="*", choices=list(SWEEPS), help="these; the others stay as --out has them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=100_000_000, help="parameters of the largest model (100M: 3 GB, minutes)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/growth.json"))
    parser.add_argument("--plot", type=Path, help="a PNG; default: beside --out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = "python -m bench.growth " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    sweeps = {name: (QUICK if options.quick else SWEEPS)[name] for name in options.only or SWEEPS}
    found: dict[str, Any] = {"command": command.strip(), "machine": machine(), "rows": []}
    if options.only and options.out.exists():
        before = json.loads(options.out.read_text())
        found["rows"] = [row for row in before["rows"] if row["sweep"] not in sweeps]
        found["command"] = "; ".join(dict.fromkeys([*before["command"].split("; "), found["command"]]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for row in run(sweeps, 2 if options.quick else options.rounds, options.largest, lambda line: print(line, flush=True)):
        # A row at a time: a run that is stopped keeps what it has measured.
        found["rows"].append(row)
        write_json(found, options.out)
    draw(found, options.plot or options.out.with_suffix(".png"))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
