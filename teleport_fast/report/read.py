"""A run's folder as plain values: what `train --out` wrote, and any teleporter's history in JSON beside it.

Files come from elsewhere, so nothing is taken for granted: what has another type than expected is left out, never guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORDS = ("history", "records", "teleports")
NUMBERS = ("step", "objective_before", "objective_after", "radius_used", "seconds", "joints", "condition")


@dataclass(frozen=True)
class History:
    """The teleports of one run, each a mapping of `NUMBERS` to a number, nan where it is missing."""

    name: str
    records: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class RunRead:
    """One run of one arm: curves, teleports, and the rows that `experiments.joints` recorded."""

    arm: str
    seed: str
    validation: tuple[tuple[float, float], ...]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    teleports: tuple[float, ...]
    deviations: tuple[float, ...]
    diverged: bool
    history: History
    joints: tuple[Mapping[str, Any], ...]


@dataclass
class Found:
    """All of a folder: a comparison and a sweep as JSON has them, the comparison's runs, histories, what was not read."""

    folder: Path
    comparison: Mapping[str, Any] = field(default_factory=dict)
    runs: tuple[RunRead, ...] = ()
    sweep: Mapping[str, Any] = field(default_factory=dict)
    histories: list[History] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def arms(self) -> list[str]:
        """Labels in the order of the comparison's arms, then of the runs."""
        listed = [text(arm.get("label")) for arm in mappings(self.comparison.get("arms"))]
        return list(dict.fromkeys([label for label in listed if label] + [run.arm for run in self.runs]))


def number(value: Any) -> float:
    """The value as a float; nan for what is no number.

    >>> number(3), number(None), number("3")
    (3.0, nan, nan)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def numbers(value: Any) -> tuple[float, ...]:
    """A list's numbers, nan where an entry is none; empty for what is no list."""
    return tuple(map(number, value)) if isinstance(value, list) else ()


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """A list's objects; empty for what is no list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def text(value: Any) -> str:
    """A string, or a number as one; empty for anything else."""
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def read_folder(folder: Path) -> Found:
    """Everything in a folder that a page can show.

    `comparison.json` and `sweep.json` are what `train` writes; every other `*.json` and `*.jsonl` is read as a history if it
    is one: a list of records (`step`, `objective_before`, `objective_after`, …), an object that holds one under "history",
    "records" or "teleports", or a record per line. The rest is named in `left_out`.
    Errors: ValueError if the folder is not there, or holds nothing to show.
    """
    if not folder.is_dir():
        raise ValueError(f"RUN_DIR must be a folder that train --out wrote, got {str(folder)!r}, which is none; run train first")
    found = Found(folder)
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")]):
        value, problem = _load(path)
        if problem:
            found.left_out.append((path.name, problem))
        elif isinstance(value, dict) and mappings(value.get("runs")) and not found.runs:
            found.comparison, found.runs = value, tuple(map(_run, mappings(value["runs"])))
        elif isinstance(value, dict) and isinstance(value.get("rates"), dict) and not found.sweep:
            found.sweep = value
        elif records := _records(value):
            found.histories.append(History(path.stem, records))
        elif path.name != "sweep.jsonl":
            found.left_out.append((path.name, "neither a comparison, a sweep nor a teleporter's history"))
    if not (found.runs or found.sweep or found.histories):
        why = "; ".join(f"{name}: {reason}" for name, reason in found.left_out) or "no .json file in it"
        raise ValueError(f"RUN_DIR must hold comparison.json, sweep.json or a history, got {str(folder)!r} ({why}); run train first")
    return found


def _load(path: Path) -> tuple[Any, str]:
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in content.splitlines() if line.strip()], ""
        return json.loads(content), ""
    except (ValueError, RecursionError) as error:
        return None, f"not readable as JSON: {error}"
    except OSError as error:
        return None, f"not readable: {error.strerror}"


def _records(value: Any) -> tuple[Mapping[str, float], ...]:
    if isinstance(value, dict):
        value = next((value[key] for key in RECORDS if isinstance(value.get(key), list)), None)
    kept = [entry for entry in mappings(value) if "step" in entry and {"objective_before", "objective_after"} & set(entry)]
    return tuple({key: number(entry.get(key)) for key in NUMBERS} for entry in kept)


def _run(run: Mapping[str, Any]) -> RunRead:
    arm, seed = text(run.get("arm")) or "unnamed", text(run.get("seed"))
    points = [numbers(point) for point in run.get("validation", ()) if isinstance(point, list) and len(point) == 2]
    return RunRead(
        arm=arm,
        seed=seed,
        validation=tuple((step, loss) for step, loss in points if math.isfinite(step) and math.isfinite(loss)),
        losses=numbers(run.get("losses")),
        gradient_norms=numbers(run.get("gradient_norms")),
        teleports=numbers(run.get("teleports")),
        deviations=numbers(run.get("deviations")),
        diverged=run.get("diverged") is True,
        history=History(f"{arm}, seed {seed}", _records(dict(run))),
        joints=tuple(mappings(run.get("joints"))),
    )
