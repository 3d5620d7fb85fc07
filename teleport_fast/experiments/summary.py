"""The numbers of a comparison's table: means and spreads over seeds, steps to the baseline's loss, overheads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from teleport_fast.experiments.compare import Comparison
from teleport_fast.experiments.train import TOLERANCE, Run


@dataclass(frozen=True)
class Row:
    """One arm: (mean, standard deviation over seeds) pairs, with nan for what was not measured.

    `gain` is the baseline's loss minus this arm's over the seeds that both have; `reach` the steps to the baseline's
    final loss of the same seed, reached in `reached` of `paired` seeds; `overhead_ms` the optimizer's milliseconds
    per step above the baseline's, `overhead_percent` the same as a share of the baseline's whole step.
    """

    arm: str
    rate: float
    seeds: int
    step: int
    loss: tuple[float, float]
    gain: tuple[float, float]
    reach: tuple[float, float]
    reached: int
    paired: int
    step_ms: float
    overhead_ms: float
    overhead_percent: float
    tokens_per_second: float
    teleports: int
    max_deviation: float


def mean_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; nan for the latter where there is one value, for both where there is none.

    >>> mean_sd([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    values = list(values)
    if not values:
        return math.nan, math.nan
    if not all(map(math.isfinite, values)):
        return math.inf, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def steps_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> float:
    """The first step at which a curve of (step, loss) is at `loss`, linear between its points; nan where it never is.

    >>> steps_to_reach([(10, 3.0), (20, 2.0)], 2.25)
    17.5
    """
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = step, value
    return math.nan


def measured(runs: Sequence[Run]) -> list[Run]:
    """The complete and the diverged runs, or, where there are none, the ones that an interruption cut short."""
    ended = [run for run in runs if run.complete or run.diverged]
    return ended or [run for run in runs if run.validation]


def rows(comparison: Comparison) -> list[Row]:
    """One Row per arm that has been measured at all, in the order of the entries."""
    baseline = {run.seed: run for run in comparison.of(comparison.baseline) if run.complete}
    found = []
    for entry in comparison.entries:
        all_runs = comparison.of(entry.arm.label)
        runs = measured(all_runs)
        if not runs:
            continue
        pairs = [(run, baseline[run.seed]) for run in all_runs if run.seed in baseline and not run.diverged]
        ended = [(run, base) for run, base in pairs if run.complete]
        reach = [steps_to_reach(run.validation, base.final) for run, base in pairs if run.validation]
        extra = mean_sd(run.optimizer_ms - base.optimizer_ms for run, base in pairs)[0]
        whole = mean_sd(base.step_ms for _, base in pairs)[0]
        found.append(
            Row(
                arm=entry.arm.label,
                rate=entry.rate,
                seeds=len(runs),
                step=min(len(run.losses) if run.diverged else run.validation[-1][0] for run in runs),
                loss=mean_sd(run.final for run in runs),
                gain=mean_sd(base.final - run.final for run, base in ended),
                reach=mean_sd(value for value in reach if math.isfinite(value)),
                reached=sum(map(math.isfinite, reach)),
                paired=len(reach),
                step_ms=mean_sd(run.step_ms for run in runs)[0],
                overhead_ms=extra,
                overhead_percent=100 * extra / whole,
                tokens_per_second=mean_sd(run.tokens_per_second for run in runs)[0],
                teleports=max(len(run.teleports) for run in runs),
                max_deviation=max(run.max_deviation for run in all_runs),
            )
        )
    return found


def function_kept(comparison: Comparison) -> bool:
    """Whether no teleport of any run moved the probe's logits by more than rounding."""
    allowed = TOLERANCE[comparison.setting.dtype]
    return all(run.max_deviation <= allowed for run in comparison.runs)
