"""What a comparison leaves behind: the table on the terminal, and everything measured as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teleport_fast.experiments.compare import Comparison
from teleport_fast.experiments.summary import Row, function_kept, rows
from teleport_fast.experiments.text import Text
from teleport_fast.experiments.train import TOLERANCE, Run


def plus_minus(value: tuple[float, float], digits: int) -> str:
    """A mean and, where there is one, its standard deviation.

    >>> plus_minus((1.23456, 0.0123), 3), plus_minus((80.0, math.nan), 0), plus_minus((math.nan, math.nan), 0)
    ('1.235 ± 0.012', '80', '–')
    """
    mean, sd = value
    if math.isinf(mean):
        return "diverged"
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if math.isfinite(sd) else "")


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _loss(row: Row, comparison: Comparison) -> str:
    early = row.step < comparison.setting.steps and math.isfinite(row.loss[0])
    return plus_minus(row.loss, 4) + (f" (step {row.step})" if early else "")


def _reach(row: Row) -> str:
    if row.paired == 0:
        return "–"
    if row.reached == 0:
        return "not reached"
    return plus_minus(row.reach, 0) + (f" ({row.reached} of {row.paired})" if row.reached < row.paired else "")


def table(comparison: Comparison) -> Table:
    """The comparison as a rich table, a column per arm so that it fits a narrow terminal; –: not measured."""
    setting, base = comparison.setting, comparison.baseline
    work = f"{setting.steps} steps of {setting.batch} x {setting.model.context} bytes, {setting.dtype}"
    shown = Table(title=f"{work}; mean ± sd over seeds", title_justify="left", title_style="")
    shown.add_column("", no_wrap=True)
    found = rows(comparison)
    for row in found:
        shown.add_column(row.arm, justify="right", overflow="fold")

    def line(title: str, cells: Callable[[Row], str], of_baseline: bool = True) -> None:
        shown.add_row(title, *(cells(row) if of_baseline or row.arm != base else "" for row in found))

    line("learning rate", lambda row: f"{row.rate:g}")
    line("seeds", lambda row: str(row.seeds))
    line("validation loss", lambda row: _loss(row, comparison))
    line(f"below {base} by", lambda row: plus_minus(row.gain, 4), of_baseline=False)
    line(f"steps to {base}'s loss", _reach)
    line("ms per step", lambda row: _number(row.step_ms, ".1f"))
    line("overhead, ms per step", lambda row: _number(row.overhead_ms, "+.1f"), of_baseline=False)
    line("overhead, %", lambda row: _number(row.overhead_percent, "+.1f"), of_baseline=False)
    line("tokens/s", lambda row: _number(row.tokens_per_second, ",.0f"))
    line("teleports in a run", lambda row: str(row.teleports), of_baseline=False)
    line("logits moved at most", lambda row: f"{row.max_deviation:.1e}", of_baseline=False)
    return shown


def print_report(comparison: Comparison, console: Console) -> None:
    """The table, and under it in words whatever makes it less than what was asked for."""
    if not rows(comparison):
        console.print("nothing was measured before the end")
        return
    console.print(table(comparison))
    if comparison.interrupted:
        console.print("Interrupted: the table, the picture and the JSON hold what was measured until then.")
    for line in comparison.skipped:
        console.print(f"Left out: {escape(line)}.")
    allowed = TOLERANCE[comparison.setting.dtype]
    if not function_kept(comparison):
        console.print(f"[bold red]A teleport moved the function[/]: its logits deviate by more than {allowed:g}.")
    elif any(run.teleports for run in comparison.runs):
        console.print(f"The function was checked at every teleport: its logits deviate by less than {allowed:g}.")


def versions() -> dict[str, Any]:
    """What a measurement depends on besides its arguments."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("teleport-fast")
    except PackageNotFoundError:
        own = "checkout"
    return {
        "teleport_fast": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def run_json(run: Run) -> dict[str, Any]:
    """A run's fields, floats of the per-step lists to six digits."""
    plain = asdict(run)
    for name in ("losses", "gradient_norms", "deviations"):
        plain[name] = [float(f"{value:.6g}") for value in plain[name]]
    return plain


def text_json(text: Text) -> dict[str, Any]:
    """Where a text came from, how much it is and the digest that equal texts share."""
    return {
        "source": text.source,
        "digest": text.digest,
        "train_bytes": len(text.train),
        "validation_bytes": len(text.validation),
        "train_files": len(text.train_files),
        "validation_files": len(text.validation_files),
    }


def as_json(comparison: Comparison, text: Text, command: str) -> dict[str, Any]:
    """Everything: command, versions, setting, text, arms, the table's rows, and every run with its curves."""
    written: dict[str, Any] = finite(
        {
            "command": command,
            "versions": versions(),
            "setting": asdict(comparison.setting),
            "text": text_json(text),
            "arms": [{"label": entry.arm.label, **asdict(entry)} for entry in comparison.entries],
            "baseline": comparison.baseline,
            "summary": [asdict(row) for row in rows(comparison)],
            "function_kept": function_kept(comparison),
            "interrupted": comparison.interrupted,
            "skipped": comparison.skipped,
            "runs": [run_json(run) for run in comparison.runs],
        }
    )
    return written


def finite(value: Any) -> Any:
    """The same nested value with None for every number that JSON cannot write."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(value: Any, path: Path) -> None:
    """Writes through a neighbour, so that an interruption never leaves half a file."""
    partial = path.with_name(path.name + ".partial")
    # A row per line of the outer lists: small enough to check in, and still readable in a diff.
    lines = ",\n".join(f"{json.dumps(key)}: {_rows_of(item)}" for key, item in value.items())
    partial.write_text("{\n" + lines + "\n}\n")
    partial.replace(path)


def _rows_of(item: Any) -> str:
    if isinstance(item, list) and item and isinstance(item[0], dict):
        return "[\n" + ",\n".join("  " + json.dumps(part, allow_nan=False) for part in item) + "\n]"
    return json.dumps(item, allow_nan=False)
