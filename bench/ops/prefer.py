"""Measures which backend computes each op fastest, and writes teleport_fast/ops/preferences.json.

python bench/ops/prefer.py [--write] [--ops OP ...] [--backends cpp ...] [--rounds 15] [--threads N]
python bench/ops/prefer.py --check [--ops OP ...]: exits with 1 if "auto" is more than 3% slower than plain torch anywhere.

Rows are written for the instruction set in use (TELEPORT_FAST_ISA chooses another); those of others stay. An op takes
part through its bench_OP.py: OP, SIZES and cases(size, dtype) -> (label, call) pairs; with BY_LAYOUT, labels end with the
layout, "rows" or "columns", and each gets rows of its own. A backend is preferred at a size where no case is more than 3%
slower than the reference (medians of interleaved rounds; a case that is gets three times the rounds before it counts).
One thread is timed by its CPU time, which other processes disturb less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from teleport_fast.experiments.timing import interleaved
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
    """Medians by backend; a short call is easily disturbed: it gets 20 ms of rounds. The first two rounds warm up."""
    found = interleaved(dict.fromkeys(names, call), rounds, warm_up=2, least=0.02, around=chooser.set_backend)
    return {name: statistics.median(times) for name, times in found.items()}


def ratios_of(call: Callable[[], object], names: list[str], rounds: int) -> tuple[float, dict[str, float]]:
    """The reference's seconds, and by how much each backend is faster; who seems to lose is measured again, longer."""
    for patience in (1, 3):
        seconds = median_seconds(call, ["reference", *names], patience * rounds)
        ratios = {name: seconds["reference"] / seconds[name] for name in names}
        if min(ratios.values()) >= 1:
            break
    return seconds["reference"], ratios


def rows_for(module: ModuleType, dtype: torch.dtype, names: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Rows {up_to, backends} of the table by layout, "" where it is all one; prints each measurement."""
    orders: dict[str, list[tuple[int, list[str]]]] = {}
    for size in module.SIZES:
        worst: dict[str, dict[str, float]] = {}
        for label, call in module.cases(size, dtype):
            reference, ratios = ratios_of(call, names, rounds)
            layout = label.rsplit(" ", 1)[-1] if getattr(module, "BY_LAYOUT", False) else ""
            least_yet = worst.setdefault(layout, dict.fromkeys(names, float("inf")))
            worst[layout] = {name: min(least_yet[name], ratios[name]) for name in names}
            shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
            print(f"{module.OP:18} {dtype!s:15} {label:24} reference {1e3 * reference:.3f} ms, {shown}", flush=True)
        for layout, ratios in worst.items():
            usable = [name for name in sorted(names, key=ratios.__getitem__, reverse=True) if ratios[name] >= 1 / SLOWER]
            orders.setdefault(layout, []).append((size, usable))
    return {layout: rows_of(order) for layout, order in orders.items()}


def rows_of(order_by_size: list[tuple[int, list[str]]]) -> list[dict[str, Any]]:
    """Neighbouring sizes of one order as one row."""
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


def tables_of(module: ModuleType, backends: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """One op's rows by "dtype", and by "dtype/layout" where layouts differ; "any": rows that hold for all of them."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for dtype in DTYPES:
        name, by_layout = str(dtype).removeprefix("torch."), rows_for(module, dtype, backends, rounds)
        tables[name] = least(list(by_layout.values()))
        if any(rows != tables[name] for rows in by_layout.values()):
            tables |= {f"{name}/{layout}": rows for layout, rows in by_layout.items()}
    return {"any": least(list(tables.values()))} | tables


def losses(modules: Iterator[ModuleType], rounds: int) -> list[str]:
    """One line for each measured case where "auto" takes more than 3% longer than plain torch; prints every op's least."""
    found = []
    for module in modules:
        ratios: list[tuple[float, str]] = []
        for dtype in DTYPES:
            for size in module.SIZES:
                for label, call in module.cases(size, dtype):
                    ratio = ratios_of(call, ["auto"], rounds)[1]["auto"]
                    ratios.append((ratio, f"{str(dtype).removeprefix('torch.')} {label}"))
        least_ratio, where = min(ratios)
        print(f"{module.OP:26} {len(ratios):3} cases, least ratio {least_ratio:.2f} at {where}", flush=True)
        found += [f"{module.OP} {where}: {ratio:.2f} of plain torch's speed" for ratio, where in ratios if ratio < 1 / SLOWER]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--check", action="store_true", help="measure what auto takes, against plain torch")
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
    if options.check:
        print(by["machine"])
        slower = losses(benches(options.ops), options.rounds)
        sys.exit("\n".join(slower) if slower else 0)
    for module in benches(options.ops):
        rows = {"measured": by, **tables_of(module, options.backends, options.rounds)}
        # An op at a time: a run that is stopped keeps what it has measured.
        if options.write:
            table = json.loads(TABLE.read_text())
            table["ops"].setdefault(module.OP, {})[isa] = rows
            TABLE.write_text(as_text(table) + "\n")
        else:
            print(json.dumps(rows, indent=1))


def as_text(table: dict[str, Any]) -> str:
    """JSON with one line per key of an op's machine, so that a change reads well."""
    ops = []
    for op, machines in sorted(table["ops"].items()):
        parts = []
        for machine, rows in sorted(machines.items()):
            lines = [f"        {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(rows.items())]
            parts.append(f"      {json.dumps(machine)}: {{\n" + ",\n".join(lines) + "\n      }")
        ops.append(f"    {json.dumps(op)}: {{\n" + ",\n".join(parts) + "\n    }")
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
