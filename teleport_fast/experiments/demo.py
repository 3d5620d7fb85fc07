"""From a request to files: the comparison and the sweep that `python -m teleport_fast train` runs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from teleport_fast.experiments.arms import Arm
from teleport_fast.experiments.compare import Entry, compare
from teleport_fast.experiments.live import Live
from teleport_fast.experiments.picture import draw, require_matplotlib
from teleport_fast.experiments.report import as_json, print_report, write_json
from teleport_fast.experiments.summary import function_kept
from teleport_fast.experiments.sweep import rate_for, sweep
from teleport_fast.experiments.text import read_text
from teleport_fast.experiments.train import Setting

INTERRUPTED = 130


@dataclass(frozen=True)
class Request:
    """What the command line asked for; the first arm is the baseline, and `control_once` gives "random" one seed."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    control_once: bool
    setting: Setting
    folder: str | None
    out: Path
    rates: tuple[float, ...] | None
    lr: float | None
    teleport_lr: float | None
    minutes: float | None
    command: str

    def __post_init__(self) -> None:
        """A number out of range is named before anything is trained, not by the arm whose turn comes minutes later."""
        for name, value, example in (("lr", self.lr, 0.001), ("teleport_lr", self.teleport_lr, 0.003), ("minutes", self.minutes, 3)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}; for example {example}, or leave it out")


def entries(request: Request) -> tuple[list[Entry], list[str]]:
    """The arms with rates and seeds, and a line per arm that says where its rate comes from."""
    made, origins = [], []
    for index, arm in enumerate(request.arms):
        asked = request.teleport_lr if index else request.lr
        rate, origin = rate_for(arm) if asked is None else (asked, "command line")
        seeds = request.seeds[:1] if request.control_once and arm.name == "random" else request.seeds
        made.append(Entry(arm, rate, seeds))
        origins.append(f"{arm.label}: learning rate {rate:g} ({origin})")
    return made, origins


def run_comparison(request: Request, console: Console, json_on_stdout: bool) -> int:
    """Trains every arm, shows the table, writes comparison.png and comparison.json; the exit code.

    0 when everything asked for was measured and no teleport moved the function, 1 when one did, 130 after Ctrl-C.
    """
    require_matplotlib()
    planned, origins = entries(request)
    text = read_text(request.folder)
    out = writable_folder(request.out)
    held_out = f"{len(text.validation) / 1e6:.2f} MB held out ({len(text.validation_files)} other files)"
    for line in [f"text: {text.source}, {len(text.train) / 1e6:.1f} MB to train on, {held_out}", *origins]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    runs = sum(len(entry.seeds) for entry in planned)
    with Live(console, runs, request.setting.steps) as live:
        comparison = compare(planned, request.setting, text, live, request.minutes)
    everything = as_json(comparison, text, request.command)
    write_json(everything, out / "comparison.json")
    draw(comparison, out / "comparison.png")
    if json_on_stdout:
        print(json.dumps(everything, allow_nan=False))
    else:
        print_report(comparison, Console())
        print(f"{out / 'comparison.png'}\n{out / 'comparison.json'}")
        print(f"a page about it: python -m teleport_fast report {shlex.quote(str(out))}")
    if comparison.interrupted:
        return INTERRUPTED
    return 0 if function_kept(comparison) else 1


def run_sweep(request: Request, console: Console, json_on_stdout: bool) -> int:
    """Tunes every arm and writes sweep.jsonl and sweep.json; the exit code, 130 after Ctrl-C."""
    text, out = read_text(request.folder), writable_folder(request.out)
    with Live(console, None, request.setting.steps) as live:
        result = sweep(request.arms, request.seeds, request.setting, text, out, request.command, request.rates, live)
    if json_on_stdout:
        print(json.dumps(result, allow_nan=False))
    else:
        _print_rates(result["rates"].items())
        print(out / "sweep.json")
    return INTERRUPTED if result["interrupted"] else 0


def _print_rates(found: Sequence[tuple[str, dict[str, Any]]]) -> None:
    for label, best in found:
        where = ", still at the edge of the grid" if best["at_edge"] else ""
        print(f"{label}: learning rate {best['rate']:g}, validation loss {_loss(best['loss'])}{where}")
        print("  " + "  ".join(f"{rate:g}: {_loss(loss)}" for rate, loss in best["losses"]))


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def writable_folder(path: Path) -> Path:
    """The folder, made where it was not there; ValueError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got {str(path)!r}: {error.strerror}") from None
    return path
