"""The page's plots: loss curves, teleports, spectra, and the losses of a sweep; None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from teleport_fast.experiments.picture import COLOURS, band, smooth
from teleport_fast.report.read import Found, History, RunRead, mappings, number, numbers
from teleport_fast.report.svg import figure, inline

MOST_LINES = 24


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each arm, the same in all of the page's plots."""
    return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(labels)}


def curves(found: Found) -> Markup | None:
    """Validation loss with its spread and the teleports; the training loss and the gradient norm, smoothed."""
    runs = {arm: [run for run in found.runs if run.arm == arm and run.losses] for arm in found.arms()}
    runs = {arm: of for arm, of in runs.items() if of}
    if not runs:
        return None
    colour = colours(found.arms())
    with figure(9.6, 6.4) as drawn:
        axes = drawn.subplot_mosaic([["loss", "loss"], ["train", "norm"]], height_ratios=(3, 2))
        for row, (arm, of) in enumerate(runs.items()):
            _spread(axes["loss"], [run.validation for run in of], colour[arm], arm, "o")
            _spread(axes["train"], [list(enumerate(smooth(run.losses), 1)) for run in of], colour[arm])
            _spread(axes["norm"], [list(enumerate(smooth(run.gradient_norms), 1)) for run in of], colour[arm])
            low, across = 0.01 + 0.03 * row, axes["loss"].get_xaxis_transform()
            ticks = max((run.teleports for run in of), key=len)
            axes["loss"].vlines(ticks, low, low + 0.022, colors=colour[arm], lw=0.6, transform=across)
        axes["loss"].set_ylabel("validation loss (nats per byte)")
        axes["loss"].set_xlabel("step")
        if axes["loss"].get_legend_handles_labels()[1]:
            axes["loss"].legend(title="band: ± sd over seeds; ticks: teleports", title_fontsize=8)
        for name, title in (("train", "training loss"), ("norm", "gradient norm")):
            axes[name].set_title(f"{title}, smoothed")
            axes[name].set_xlabel("step")
        if any(value > 0 for of in runs.values() for run in of for value in run.gradient_norms):
            _logarithmic(axes["norm"].yaxis, axes["norm"].set_yscale)
        return inline(drawn, "curves", "Validation loss, training loss and gradient norm against steps, a line per arm")


def teleports(history: History, deviations: Sequence[float], name: str, colour: str) -> Markup | None:
    """One run's teleports: the objective before and after, the radius used, how far the logits moved."""
    records = [record for record in history.records if math.isfinite(record["step"])]
    if not records:
        return None
    steps = [record["step"] for record in records]
    with figure(9.6, 2.5) as drawn:
        objective, radius, logits = drawn.subplots(1, 3, width_ratios=(1.5, 1, 1))
        before = [record["objective_before"] for record in records]
        after = [record["objective_after"] for record in records]
        objective.vlines(steps, before, after, colors=colour, lw=0.7, alpha=0.5)
        objective.plot(steps, before, "o", ms=2.6, mfc="white", mec=colour, mew=0.8, label="before")
        objective.plot(steps, after, "o", ms=2.6, color=colour, label="after")
        objective.set_title("objective")
        objective.legend(ncols=2)
        positive = [value for value in (*before, *after) if value > 0]
        if len(positive) == 2 * len(steps) and max(positive) > 100 * min(positive):
            _logarithmic(objective.yaxis, objective.set_yscale)
        used = [record["radius_used"] for record in records]
        radius.plot(steps, used, "o", ms=2.6, color=colour)
        radius.set_ylim(0, 1.1 * max((value for value in used if 0 < value < math.inf), default=1.0))
        radius.set_title("radius used")
        checked = [value for value in deviations if value > 0]
        if checked and len(deviations) == len(steps):
            logits.plot(steps, deviations, "o", ms=2.6, color=colour)
            _logarithmic(logits.yaxis, logits.set_yscale)
            logits.set_title("relative change of the logits")
        else:
            logits.plot(steps, [1e3 * record["seconds"] for record in records], "o", ms=2.6, color=colour)
            logits.set_title("milliseconds")
        for axes in (objective, radius, logits):
            axes.set_xlabel("step")
        return inline(drawn, name, f"Teleports of {history.name}: objective before and after, radius, change of the logits")


def spectra(run: RunRead, name: str) -> Markup | None:
    """The last move's log P by rank, and each kind's gradient covariance: eigenvalues beside the diagonal in the basis."""
    stretched = [row for row in run.joints if any(abs(value) > 1e-3 for value in numbers(row.get("log_p")))]
    covariances = [row for row in run.joints if _pair(row) is not None]
    kinds = list(dict.fromkeys(str(row.get("kind")) for row in covariances))[:3]
    panels = (1 if stretched else 0) + len(kinds)
    if not panels:
        return None
    with figure(9.6, 2.9) as drawn:
        # at least three places, so that a lone panel is not drawn three times as large as its text
        places = list(drawn.subplots(1, max(3, panels))[:panels])
        for empty in drawn.axes[panels:]:
            empty.remove()
        if stretched:
            _draw_log_p(places.pop(0), stretched)
        for kind, axes in zip(kinds, places, strict=True):
            alike = [row for row in covariances if str(row.get("kind")) == kind][:MOST_LINES]
            for index, row in enumerate(alike):
                pair = _pair(row)
                assert pair is not None
                ranks = [_rank(i, len(pair[0])) for i in range(len(pair[0]))]
                axes.plot(ranks, pair[0], color=COLOURS[2], lw=1, alpha=0.7, label=None if index else "eigenvalues")
                axes.plot(ranks, pair[1], color=COLOURS[1], lw=1, ls=(0, (3, 2)), label=None if index else "diagonal")
            _logarithmic(axes.yaxis, axes.set_yscale)
            # what rounding leaves of a direction that no gradient has seen says nothing
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-7))
            axes.set_title(f"gradient covariance: {kind}")
            axes.set_xlabel("rank, as a share")
            axes.legend()
        return inline(drawn, name, f"Spectra of {run.arm}: eigenvalues of log P, and of the gradient covariances")


def sweep(found: Mapping[str, Any]) -> Markup | None:
    """Validation loss against the learning rate, a line per arm, the best marked."""
    rates = {str(arm): best for arm, best in found.get("rates", {}).items() if isinstance(best, dict)}
    lines = {arm: [numbers(point) for point in best.get("losses", ()) if isinstance(point, list)] for arm, best in rates.items()}
    kept = {arm: [p for p in points if len(p) == 2 and p[0] > 0 and math.isfinite(p[1])] for arm, points in lines.items()}
    if not any(kept.values()):
        return None
    colour = colours(list(kept))
    with figure(9.6, 3.4) as drawn:
        axes = drawn.subplots()
        for arm, points in kept.items():
            axes.plot([p[0] for p in points], [p[1] for p in points], "o-", ms=4, color=colour[arm], label=arm)
            best = number(rates[arm].get("rate")), number(rates[arm].get("loss"))
            if all(map(math.isfinite, best)):
                axes.plot(*best, "o", ms=10, mfc="none", mec=colour[arm])
        _logarithmic(axes.xaxis, axes.set_xscale)
        axes.set_xlabel("learning rate (ring: the best)")
        axes.set_ylabel("validation loss")
        axes.legend()
        return inline(drawn, "sweep-losses", "Validation loss against the learning rate, a line per arm")


def _draw_log_p(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    kinds = list(dict.fromkeys(str(row.get("kind")) for row in rows))
    drawn: set[str] = set()
    for row in rows[:MOST_LINES]:
        kind, values = str(row.get("kind")), numbers(row.get("log_p"))
        ranks = [_rank(i, len(values)) for i in range(len(values))]
        style = {"color": COLOURS[kinds.index(kind) % len(COLOURS)], "label": None if kind in drawn else kind}
        axes.plot(ranks, values, lw=1, alpha=0.8, marker="." if len(values) < 3 else "", **style)
        drawn.add(kind)
    axes.axhline(0, color="#9aa1ad", lw=0.8)
    axes.set_title("eigenvalues of log P, last move")
    axes.set_xlabel("rank, as a share")
    axes.legend()


def _pair(row: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    held = mappings([row.get("covariance")])
    both = (numbers(held[0].get("eigenvalues")), numbers(held[0].get("diagonal"))) if held else ((), ())
    return both if len(both[0]) == len(both[1]) > 1 and any(value > 0 for value in both[0]) else None


def _rank(index: int, count: int) -> float:
    return index / max(1, count - 1)


def _logarithmic(axis: Any, set_scale: Any) -> None:
    from matplotlib.ticker import LogFormatter

    class Figures(LogFormatter):
        """Two figures where one would name neighbouring ticks alike, as 1.5e-07 and 2e-07."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            shown = super().__call__(x, pos)
            return self.fix_minus(f"{x:g}" if 1e-3 <= x < 1e4 else f"{x:.2g}") if shown else ""

    set_scale("log", nonpositive="mask")
    axis.set_major_formatter(Figures())
    # within less than two decades the steps between powers of ten are named too
    axis.set_minor_formatter(Figures(minor_thresholds=(2, 0.4)))


def _spread(axes: Any, every: Sequence[Sequence[tuple[float, float]]], colour: str, label: str = "", marker: str = "") -> None:
    longest = max(map(len, every), default=0)
    # an interrupted run would cut its arm's mean short
    points = band([[(int(x), y) for x, y in one] for one in every if len(one) == longest]) if longest else []
    if not points:
        return
    steps, means, deviations = zip(*points, strict=True)
    low = [mean - sd for mean, sd in zip(means, deviations, strict=True)]
    high = [mean + sd for mean, sd in zip(means, deviations, strict=True)]
    axes.plot(steps, means, color=colour, label=label or None, marker=marker, ms=3, lw=1.5)
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
