"""Rows of trainings in a file, one appended as each ends, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.convergence.interface import Result, Task, Trial
from teleport_fast.experiments.report import finite


def digest(setting: dict[str, Any]) -> str:
    """Ten letters that change with anything in a setting.

    >>> digest({"steps": 1}) == digest({"steps": 2})
    False
    """
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:10]


def short(value: float) -> float:
    """Six digits: more than a loss carries from machine to machine."""
    return float(f"{value:.6g}")


class Store:
    """The rows of one task's setting in `path`; ValueError that names a damaged file."""

    def __init__(self, path: Path, task: Task) -> None:
        self.path, self.task = path, task.name
        self.setting = digest(task.setting())
        self._results: dict[str, Result] = {}
        for row in self._read():
            if (row["task"], row["setting"]) == (self.task, self.setting):
                self._results[self._key(Trial(row["arm"], row["rate"], row["options"], row["share"]), row["seed"])] = _result(row)

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path} must hold one JSON object a line, got {error} in line {number}; remove that line") from None

    @staticmethod
    def _key(trial: Trial, seed: int) -> str:
        return json.dumps([trial.arm, trial.rate, sorted(trial.options.items()), trial.share, seed])

    def get(self, trial: Trial, seed: int) -> Result | None:
        """The result of a training that has ended, or None."""
        return self._results.get(self._key(trial, seed))

    def missing(self, trial: Trial, seeds: Sequence[int]) -> list[int]:
        """The seeds that have not been trained yet."""
        return [seed for seed in seeds if self.get(trial, seed) is None]

    def add(self, trial: Trial, result: Result, curve: bool = True) -> None:
        """Appends a row; `curve=False` leaves the curve out of it, as tuning does, whose curves nobody reads."""
        self._results[self._key(trial, result.seed)] = result
        row = {
            "task": self.task, "setting": self.setting, "arm": trial.arm, "rate": trial.rate, "options": dict(trial.options),
            "share": trial.share, "seed": result.seed, "final": short(result.final),
            "measures": {name: short(value) for name, value in result.measures.items()},
            **({"seconds": short(result.seconds), "optimizer_seconds": short(result.optimizer_seconds)} if result.seconds else {}),
            **({"curve": [[step, short(loss)] for step, loss in result.curve]} if curve else {}),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")


def _result(row: dict[str, Any]) -> Result:
    number = lambda value: math.inf if value is None else float(value)  # noqa: E731
    curve = [(int(step), number(loss)) for step, loss in row.get("curve", [])]
    measures = {name: number(value) for name, value in row["measures"].items()}
    return Result(row["seed"], number(row["final"]), curve, measures, row.get("seconds", 0.0), row.get("optimizer_seconds", 0.0))
