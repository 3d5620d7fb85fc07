"""The picture of a task: every arm's losses at the end, a point a seed, and the curves of the best arms beside the baseline's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.convergence.interface import Result
from bench.convergence.protocol import Outcome
from teleport_fast.experiments.picture import COLOURS, require_matplotlib


def draw(outcome: Outcome, path: Path) -> None:
    """Writes a PNG; an arm that diverged on a seed is named and not drawn."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    task = outcome.task
    means = {arm: _mean(results) for arm, results in outcome.results.items()}
    order = sorted(means, key=lambda arm: means[arm])
    curved = any(result.curve for results in outcome.results.values() for result in results)
    figure = Figure(figsize=(12 if curved else 7, max(3.0, 0.27 * len(order) + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    ends, *others = figure.subplots(1, 2 if curved else 1, squeeze=False)[0]
    baseline = next(iter(outcome.results))
    best = [arm for arm in order if arm != baseline and math.isfinite(means[arm])][: len(COLOURS) - 1]
    colours = dict(zip([baseline, *best], COLOURS, strict=False))
    for place, arm in enumerate(order):
        finals = [result.final for result in outcome.results[arm]]
        if not all(map(math.isfinite, finals)):
            ends.text(0.02, place, task.failed, transform=ends.get_yaxis_transform(), va="center")
            continue
        ends.plot(finals, [place] * len(finals), "o", ms=4, alpha=0.6, color=colours.get(arm, "#999999"))
        ends.plot([means[arm]], [place], "|", ms=14, color="#000000")
    if math.isfinite(means[baseline]):
        ends.axvline(means[baseline], color="#000000", lw=0.6, ls=":")
    ends.set_yticks(range(len(order)), order)
    ends.invert_yaxis()
    ends.set_xlabel(f"{task.loss} at the end; |: mean")
    if task.compared_by == "ratio":
        ends.set_xscale("log")
    for curves in others:
        _curves(outcome, curves, colours)
    figure.suptitle(f"{task.name}: {len(next(iter(outcome.results.values())))} paired seeds, each arm at its best trial")
    figure.savefig(path, dpi=100)


def _curves(outcome: Outcome, curves: Any, colours: dict[str, str]) -> None:
    task = outcome.task
    for arm, colour in colours.items():
        results = [result for result in outcome.results[arm] if result.curve]
        if not results:
            continue
        steps = [step for step, _ in results[0].curve]
        losses = [_mean_of([result.curve[i][1] for result in results], task.compared_by) for i in range(len(steps))]
        curves.plot(steps, losses, color=colour, lw=1.4, label=arm)
    curves.set_xlabel("steps")
    curves.set_ylabel(task.loss)
    curves.legend(fontsize="small")
    if task.compared_by == "ratio":
        curves.set_yscale("log")


def _mean(results: list[Result]) -> float:
    return _mean_of([result.final for result in results], "ratio")


def _mean_of(values: list[float], by: str) -> float:
    if not all(map(math.isfinite, values)):
        return math.inf
    if by == "ratio":
        return math.exp(sum(math.log(max(value, 1e-38)) for value in values) / len(values))
    return sum(values) / len(values)
