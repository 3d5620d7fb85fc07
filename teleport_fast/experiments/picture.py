"""The picture of a comparison: validation loss with its spread and the teleports above, gradient norm below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from teleport_fast.experiments.compare import Comparison
from teleport_fast.experiments.summary import mean_sd, rows

Curve = Sequence[tuple[int, float]]
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SMOOTHING = 0.9


def smooth(values: Sequence[float], decay: float = SMOOTHING) -> list[float]:
    """Exponential moving average without the start's bias towards zero.

    >>> smooth([2.0, 2.0])
    [2.0, 2.0]
    """
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed


def band(curves: Sequence[Curve]) -> list[tuple[int, float, float]]:
    """(step, mean, standard deviation or 0) at the steps that every curve has.

    >>> band([[(1, 2.0), (2, 1.0)], [(1, 4.0)]])
    [(1, 3.0, 1.4142135623730951)]
    """
    common = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
    at = [{step: value for step, value in curve} for curve in curves]
    spread = [(step, *mean_sd(curve[step] for curve in at)) for step in common]
    return [(step, mean, sd if math.isfinite(sd) else 0.0) for step, mean, sd in spread if math.isfinite(mean)]


def require_matplotlib() -> None:
    """Raises ModuleNotFoundError with the command that installs matplotlib where it is missing."""
    if find_spec("matplotlib") is None:
        remedy = "pip install 'teleport-fast[plot]' (or: pip install matplotlib)"
        raise ModuleNotFoundError(f"the picture needs matplotlib; {remedy}", name="matplotlib")


def draw(comparison: Comparison, path: Path) -> None:
    """Writes the PNG; arms that measured nothing are left out."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    marks = 0
    for index, entry in enumerate(comparison.entries):
        runs = [run for run in comparison.of(entry.arm.label) if run.losses]
        if not runs:
            continue
        colour, seeds = COLOURS[index % len(COLOURS)], len(runs)
        label = f"{entry.arm.label} (lr {entry.rate:g}, {seeds} seed{'s' if seeds > 1 else ''})"
        _spread(above, _longest([run.validation for run in runs]), colour, label, marker="o")
        norms = [list(enumerate(smooth(run.gradient_norms), 1)) for run in runs]
        _spread(below, _longest(norms), colour, None)
        teleports = max((run.teleports for run in runs), key=len)
        if teleports:
            # A row of ticks per teleported arm along the lower edge, in the axes' own height.
            low = 0.01 + 0.035 * marks
            above.vlines(teleports, low, low + 0.025, colors=colour, lw=0.6, transform=above.get_xaxis_transform())
            marks += 1
    found = {row.arm: row for row in rows(comparison)}
    base = found.get(comparison.baseline)
    if base and math.isfinite(base.loss[0]):
        above.axhline(base.loss[0], color=COLOURS[0], lw=0.8, ls=":")
    setting = comparison.setting
    model = f"Byte-level GPT, {setting.model.layers} layers, width {setting.model.d_model}"
    above.set_title(f"{model}, {setting.batch} x {setting.model.context} bytes a step", fontsize=10, loc="left")
    above.set_ylabel("validation loss (nats per byte)")
    if above.get_legend_handles_labels()[1]:
        above.legend(frameon=False, title="band: ± sd over seeds; ticks: teleports", title_fontsize=8, fontsize=9)
        below.set_yscale("log")
    below.set_ylabel("gradient norm")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")


def _longest(curves: Sequence[Curve]) -> list[Curve]:
    """The curves that go as far as the longest: an interrupted run would cut its arm's mean short."""
    length = max(map(len, curves))
    return [curve for curve in curves if len(curve) == length] if length else []


def _spread(axes: Any, curves: Sequence[Curve], colour: str, label: str | None, marker: str = "") -> None:
    points = band(curves) if curves else []
    if not points:
        return
    steps, means, deviations = zip(*points, strict=True)
    low = [mean - sd for mean, sd in zip(means, deviations, strict=True)]
    high = [mean + sd for mean, sd in zip(means, deviations, strict=True)]
    axes.plot(steps, means, color=colour, label=label, marker=marker, ms=3, lw=1.5)
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
