"""Arms times seeds on the same text: every seed's initial weights and batches are shared by all arms."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from teleport_fast.experiments.arms import Arm
from teleport_fast.experiments.text import Text
from teleport_fast.experiments.train import Run, Setting, train


@dataclass(frozen=True)
class Entry:
    """One arm of a comparison with its learning rate and the seeds it runs."""

    arm: Arm
    rate: float
    seeds: tuple[int, ...]


class Watcher(Protocol):
    """Is told how a comparison goes."""

    def started(self, arm: str, seed: int) -> None:
        """A run begins."""

    def step(self, run: Run) -> None:
        """A run took a step."""

    def finished(self, run: Run) -> None:
        """A run ended, for whatever reason."""


class Silent:
    """A watcher that shows nothing."""

    def started(self, arm: str, seed: int) -> None:
        """Shows nothing."""

    def step(self, run: Run) -> None:
        """Shows nothing."""

    def finished(self, run: Run) -> None:
        """Shows nothing."""


@dataclass
class Comparison:
    """What was asked for, the runs in the order they ended, and what was left out and why."""

    entries: tuple[Entry, ...]
    setting: Setting
    runs: list[Run] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def baseline(self) -> str:
        """The label of the first arm, which the others are measured against."""
        return self.entries[0].arm.label

    def of(self, label: str) -> list[Run]:
        """The runs of one arm."""
        return [run for run in self.runs if run.arm == label]


def jobs(entries: Sequence[Entry]) -> list[tuple[Entry, int]]:
    """Every (entry, seed), seed by seed, so that whatever an early end leaves is paired; last, arms with fewer seeds."""
    seeds = sorted({seed for entry in entries for seed in entry.seeds})
    pairs = [(entry, seed) for seed in seeds for entry in entries if seed in entry.seeds]
    return sorted(pairs, key=lambda pair: len(pair[0].seeds) < len(seeds))


def compare(
    entries: Sequence[Entry],
    setting: Setting,
    text: Text,
    watcher: Watcher | None = None,
    minutes: float | None = None,
) -> Comparison:
    """Runs every arm with every one of its seeds; the first entry is the baseline.

    A run that would not fit into `minutes`, judged by the longest run so far, is left out and named in `skipped`.
    Ctrl-C ends the comparison with `interrupted` and what was measured. Raises ValueError for no entries and for two
    entries with the same label.
    """
    labels = [entry.arm.label for entry in entries]
    if not entries or len(set(labels)) < len(labels):
        raise ValueError(f"entries must hold at least one arm and each once, got {labels}; drop the repeated ones")
    comparison, shown, begun = Comparison(tuple(entries), setting), watcher or Silent(), time.perf_counter()
    longest = 0.0
    try:
        for entry, seed in jobs(entries):
            elapsed = time.perf_counter() - begun
            if minutes is not None and elapsed + longest > 60 * minutes:
                comparison.skipped.append(
                    f"{entry.arm.label}, seed {seed}: a run takes up to {longest:.0f} s and "
                    f"{max(0.0, 60 * minutes - elapsed):.0f} s of the {minutes:g} minutes are left"
                )
                continue
            shown.started(entry.arm.label, seed)
            run = train(entry.arm, entry.rate, seed, setting, text, shown.step)
            comparison.runs.append(run)
            shown.finished(run)
            longest = max(longest, run.seconds)
            if run.interrupted:
                comparison.interrupted = True
                break
    except KeyboardInterrupt:
        comparison.interrupted = True
    return comparison
