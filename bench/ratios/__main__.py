"""Every op beside torch's own route, a copy of as many bytes and the BLAS, on one thread; ratios to JSON.

    python -m bench.ratios [--quick] [--only OP ...] [--out FILE] [--compare [FILE] [--strict]] [--plot FILE]

A complete run takes two minutes of one core, --quick twenty seconds. --compare prints what got better or worse than in the committed
run (or FILE) beyond the spread; --strict exits with 1 where something got worse. CPU time of this thread, so that other work on the
machine hardly shows; routes take turns, and every figure is the median over rounds of a ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from bench.ratios.cases import cases
from bench.ratios.compare import changes
from bench.ratios.formulas import FLOPS
from bench.ratios.measure import machine, run
from teleport_fast.experiments.report import write_json

RECORDED = Path("bench/recorded/ratios.json")
OPS = (*FLOPS, "data_dependent_steps_")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.ratios", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32 at the middle size")
    parser.add_argument("--only", nargs="*", default=[], choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/ratios.json"))
    parser.add_argument("--compare", type=Path, nargs="?", const=RECORDED, help=f"with a run's JSON; without a name {RECORDED}")
    parser.add_argument("--strict", action="store_true", help="exit 1 where something got worse")
    parser.add_argument("--plot", type=Path, help="the roofline, a PNG; default: beside --out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.compare and not options.compare.exists():
        parser.error(f"--compare: {options.compare} is not there; measure it with --out {options.compare}")
    command = "python -m bench.ratios " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    rounds, least = (5, 0.3) if options.quick else (5, 1.0)
    old = json.loads(options.compare.read_text()) if options.compare else None
    by = machine()
    rows = run(cases(options.quick, tuple(options.only)), rounds, least, lambda line: print(line, flush=True))
    found = {"command": command.strip(), "machine": by, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(found, options.out)
    print(f"{len(rows)} cases -> {options.out}")
    try:
        from bench.ratios.roofline import draw

        draw(found, options.plot or options.out.with_suffix(".png"))
    except ModuleNotFoundError as missing:
        print(f"no picture: {missing}", file=sys.stderr)
    if old is None:
        return 0
    told = changes(found, old)
    print("\n".join(["", f"against {options.compare}:", *told]))
    return int(options.strict and any(line.startswith("worse") for line in told))


if __name__ == "__main__":
    sys.exit(main())
