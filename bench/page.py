"""Writes docs/benchmarks.md from the committed runs: `python -m bench.page`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "bench" / "recorded"
PAGE = ROOT / "docs" / "benchmarks.md"
Run = dict[str, Any]
MODES = ("find_symmetries", "rotations", "grad_norm", "AdamW")


def load() -> dict[str, Run]:
    """The committed runs by name; one that was not recorded is left out, and the page says so."""
    paths = {name: RECORDED / f"{name}.json" for name in SECTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def spread(found: dict[str, float]) -> str:
    """Median with quartiles, three digits.

    >>> spread({"median": 1.2345, "low": 1.0, "high": 12.345})
    '1.23 [1, 12.3]'
    """
    return f"{found['median']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def setting(run: Run) -> str:
    """The machine of a run, in words."""
    by = run["machine"]
    return f"{by['cpu']}, {by['isa']}, torch {by['torch']}, load {by['load']} on {by['cpus']} usable core(s); `{run['command']}`"


def beyond(ratio: dict[str, float]) -> int:
    """1 where the quartiles are above one, -1 where they are below, else 0."""
    return (ratio["low"] > 1) - (ratio["high"] < 1)


def kernels(run: Run) -> Iterator[str]:
    """Every op's table, who wins and loses, the share of the roof."""
    rows = [row for row in run["rows"] if "auto" in row["routes"]]
    verdicts = [beyond(row["routes"]["auto"]["speed"]) for row in rows]
    yield "## Kernels beside torch"
    yield ""
    yield (
        "torch's time over ours, median [quartiles]. torch is the faster of the op's plain reference and, where there is one, a shorter way: "
        "two `bmm` and a subtraction, `bmm` and `copy_`, foreach Adam between `bmm`, fused AdamW after `mul_`. `auto` is what a user "
        "gets, `cpp` the kernel where it was asked for. Of the roof: the longer of `copy_` of as many bytes and the BLAS's time for as "
        "many operations, over the kernel's time; above 1 where less is written than a copy writes, or the caches hold it."
    )
    yield ""
    yield (
        f"Of {len(rows)} cases `auto` is faster than torch beyond the spread in {verdicts.count(1)}, slower in {verdicts.count(-1)}, "
        f"level in {verdicts.count(0)}. {setting(run)}."
    )
    yield ""
    yield from losses(rows)
    yield ""
    yield "### All cases"
    yield ""
    body = []
    for row in rows:
        routes = row["routes"]
        best = routes.get("cpp", routes["auto"])
        body.append(
            [
                row["op"], row["dtype"], row["size"], spread(routes["auto"]["speed"]),
                spread(routes["cpp"]["speed"]) if "cpp" in routes else "no kernel",
                f"{best['over_clone']['median']:.2g}", f"{best['of_blas']['median']:.2g}", f"{best['of_roof']['median']:.2g}",
            ]
        )  # fmt: skip
    yield from table(["op", "dtype", "size", "auto", "cpp", "bytes/s over clone's", "of the BLAS's flops", "of the roof"], body)
    yield ""
    yield "![Roofline, a panel per op](evidence/benchmarks/roofline.png)"
    yield ""
    yield (
        "bfloat16: torch's products and sums round to bfloat16, ours return float32. Operations are counted by formula "
        "(`bench/ratios/formulas.py`), a triangle for a symmetric product. The bars of each op are in [kernels.md](kernels.md)."
    )
    yield ""


def losses(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Where a kernel or `auto` is slower than torch beyond the spread, the worst first."""
    yield "### Where we lose"
    yield ""
    found = []
    for row in rows:
        for route in ("auto", "cpp"):
            speed = row["routes"][route]["speed"] if route in row["routes"] else None
            if speed and beyond(speed) < 0:
                found.append((speed["median"], f"- `{route}`, {row['op']} {row['dtype']} {row['size']}: {spread(speed)}"))
    yield from [line for _, line in sorted(found)] or ["Nowhere beyond the spread in this run."]
    yield ""
    low = sorted(rows, key=lambda row: row["routes"].get("cpp", row["routes"]["auto"])["of_roof"]["median"])[:5]
    shown = ", ".join(
        f"{row['op']} {row['dtype']} {row['size']} ({row['routes'].get('cpp', row['routes']['auto'])['of_roof']['median']:.2g})" for row in low
    )
    yield f"Farthest from the roof: {shown}."


def peers(run: Run) -> Iterator[str]:
    """A table per model: cost of a step, state, peak."""
    yield "## A step beside its peers"
    yield ""
    yield (
        "Cost: what a step takes on top of the gradient, over one forward plus backward of the same batch (SAM's holds its second one); an "
        "optimizer that works every few steps at the mean over its period, a teleport by itself whole. State: what stays allocated; peak: the "
        f"most that is out during a step; both over the parameters' bytes. {setting(run)}."
    )
    for model in dict.fromkeys(row["model"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["model"] == model]
        yield from ("", f"### {model}, {rows[0]['parameters'] / 1e6:.2g}M parameters", "")
        body = [[row["arm"], spread(row["cost"]), f"{row['state']:.3g}", f"{row['peak']:.3g}"] for row in rows]
        yield from table(["", "of forward + backward", "state", "peak"], body)


def growth(run: Run) -> Iterator[str]:
    """Exponents of every sweep, and the sizes themselves."""
    yield "## How it grows"
    yield ""
    yield (
        "GPTs of the demo's kind, 256 tokens. The exponent of time over what is swept (parameters over their number); `rotations` and "
        "`grad_norm` are a teleport of all joints at one step, AdamW the plain step (for-loop). Memory: the most out at once during a call, "
        f"over the parameters. {setting(run)}."
    )
    yield ""
    fitted = [row for row in run["rows"] if "exponents" in row]
    names = [*MODES, "forward + backward"]
    yield from table(["time over", *names], [[row["sweep"], *(f"{row['exponents'][name]:.2f}" for name in names)] for row in fitted])
    yield ""
    body = []
    for row in run["rows"]:
        if "value" in row:
            shape = f"{row['layers']} layers, {row['heads']} heads, width {row['width']}"
            times = [f"{row['time'][name]['median']:.3g}" for name in MODES]
            memory = [f"{row['memory'][name]:.2g}" for name in MODES]
            body.append([row["sweep"], f"{row['parameters'] / 1e6:.3g}M", shape, str(row["joints"]), *times, ", ".join(memory)])
    if max(row["parameters"] for row in run["rows"] if "value" in row) < 50_000_000:
        yield "The model of 100M parameters that the whole command ends with was not part of this run."
        yield ""
    head = ["swept", "parameters", "shape", "joints", *(f"{name}, of forward + backward" for name in MODES), "memory (in this order)"]
    yield from table(head, body)
    yield ""
    yield "![Growth of time and memory](evidence/benchmarks/growth.png)"


SECTIONS: dict[str, Callable[[Run], Iterator[str]]] = {"ratios": kernels, "peers": peers, "growth": growth}
HEAD = """# Benchmarks

Written by `python -m bench.page` from the runs committed in `bench/recorded`; a test holds the page to them. Ratios only: routes take
turns in one process on one thread, by its CPU time, and a figure is the median over rounds of a ratio within a round, with quartiles.
Nothing here ran on a GPU; `python bench/gpu` measures there. Which rotations help training is in [evidence/rotated.md](evidence/rotated.md).

## Measure again

```sh
make bench                                  # the kernels, and what changed since the committed run beyond its spread
make bench BENCH_ARGS="--quick --compare"   # float32 at the middle size
python -m bench.peers                       # a step beside its peers
python -m bench.growth                      # 1M to 100M parameters: 3 GB, some minutes
python -m bench.ratios.guard                # what CI runs: a kernel under 0.6 of its recorded ratio fails
make bench-each                             # pytest-benchmark: each route of each op by the wall clock, one after the other
```

To commit a run: `--out bench/recorded/NAME.json --plot docs/evidence/benchmarks/NAME.png` (`roofline.png` for the kernels), then
`python -m bench.page`.
"""


def render(runs: dict[str, Run]) -> str:
    """The page's text."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        missing = [f"No run of `python -m bench.{name}` is committed yet."]
        parts.append("\n".join([*(section(runs[name]) if name in runs else missing), ""]))
    return "\n".join(parts)


def main() -> int:
    PAGE.write_text(render(load()))
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
