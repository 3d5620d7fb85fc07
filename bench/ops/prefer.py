"""Measures which backend computes each op fastest, and writes teleport_fast/ops/preferences.json.

python bench/ops/prefer.py [--write] [--ops OP ...] [--backends cpp ...] [--rounds 15] [--threads N]

An op takes part through its bench_OP.py: OP, SIZES and cases(size, dtype) -> (label, call) pairs. A backend is
preferred at a size where no case is more than 3% slower than the reference (medians of interleaved rounds).
One thread is timed by its CPU time, which other processes disturb less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from teleport_fast.ops import backend as chooser

TABLE = Path(chooser.__file__).parent / "preferences.json"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SLOWER = 1.03


def benches(wanted: list[str]) -> Iterator[ModuleType]:
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if hasattr(module, "cases") and (not wanted or module.OP in wanted):
            yield module


def median_seconds(call: Callable[[], object], names: list[str], rounds: int) -> dict[str, float]:
    """Medians by backend; the rounds interleave, so that what disturbs the machine disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for number in range(rounds + 2):
        for name in names:
            with chooser.set_backend(name):
                start = clock()
                call()
                # The first two rounds warm up.
                if number > 1:
                    seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def rows_for(module: ModuleType, dtype: torch.dtype, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Rows {up_to, backends} of the table; prints each measurement."""
    order_by_size: list[tuple[int, list[str]]] = []
    for size in module.SIZES:
        worst = dict.fromkeys(names, float("inf"))
        for label, call in module.cases(size, dtype):
            seconds = median_seconds(call, ["reference", *names], rounds)
            ratios = {name: seconds["reference"] / seconds[name] for name in names}
            worst = {name: min(worst[name], ratios[name]) for name in names}
            shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
            ours = f"reference {1e3 * seconds['reference']:.3f} ms, {shown}"
            print(f"{module.OP:18} {dtype!s:15} {label:24} {ours}", flush=True)
        usable = [name for name in sorted(names, key=worst.__getitem__, reverse=True) if worst[name] >= 1 / SLOWER]
        order_by_size.append((size, usable))
    rows: list[dict[str, Any]] = []
    for size, order in order_by_size:
        if rows and rows[-1]["backends"] == order:
            rows[-1]["up_to"] = size
        else:
            rows.append({"up_to": size, "backends": order})
    # Beyond the largest size measured, and where the reference won there, nothing is claimed.
    if rows[-1]["backends"]:
        rows.append({"up_to": None, "backends": []})
    rows[-1]["up_to"] = None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--ops", nargs="*", default=[], help="these only; the others keep their rows")
    parser.add_argument("--backends", nargs="*", default=["cpp"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.backends:
        if chooser.availability(name) is not True:
            sys.exit(f"backend {name!r} is not available: {chooser.availability(name)}")
    isa = torch.ops.teleport_fast_cpp.isa() if chooser.availability("cpp") is True else "no extension"
    by = {
        "command": " ".join(["python bench/ops/prefer.py", *sys.argv[1:]]),
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads, {isa}, torch {torch.__version__}",
    }
    measured: dict[str, dict[str, Any]] = {}
    for module in benches(options.ops):
        tables = {
            f"cpu/{str(dtype).removeprefix('torch.')}": rows_for(module, dtype, options.backends, options.rounds)
            for dtype in DTYPES
        }
        # Calls of mixed dtypes: where the slowest dtype still wins.
        measured[module.OP] = {"measured": by, "cpu": least(list(tables.values())), **tables}
    table = json.loads(TABLE.read_text())
    table["ops"].update(measured)
    text = as_text(table)
    if options.write:
        TABLE.write_text(text + "\n")
    else:
        print(text)


def as_text(table: dict[str, Any]) -> str:
    """JSON with one line per key of an op, so that a change reads well."""
    ops = []
    for op, tables in sorted(table["ops"].items()):
        lines = [f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(tables.items())]
        ops.append(f"    {json.dumps(op)}: {{\n" + ",\n".join(lines) + "\n    }")
    return '{\n  "ops": {\n' + ",\n".join(ops) + "\n  }\n}"


def least(tables: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows that hold for every table: at each size the backends that all of them name, in the first one's order."""

    def backends_at(rows: list[dict[str, Any]], size: float) -> list[str]:
        return next(row["backends"] for row in rows if row["up_to"] is None or size <= row["up_to"])

    limits = sorted({row["up_to"] for rows in tables for row in rows if row["up_to"] is not None})
    merged: list[dict[str, Any]] = []
    for limit in (*limits, None):
        size = float("inf") if limit is None else limit
        common = [name for name in backends_at(tables[0], size) if all(name in backends_at(t, size) for t in tables)]
        if merged and merged[-1]["backends"] == common:
            merged[-1]["up_to"] = limit
        else:
            merged.append({"up_to": limit, "backends": common})
    return merged


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
