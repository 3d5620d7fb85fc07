"""The picture of a history: the objective before and after each teleport, how far it went, what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teleport_fast.record import TeleportRecord

MATPLOTLIB = "the picture needs matplotlib; pip install 'teleport-fast[plot]' (or: pip install matplotlib)"


def draw(history: Sequence[TeleportRecord], path: Path | None = None) -> Any:
    """The Figure, saved to `path` where one is given; an empty history has empty axes.

    Errors: ModuleNotFoundError that says how to install matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MATPLOTLIB, name=error.name) from error

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    objective, far, cost = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 1.4))
    steps = [record.step for record in history]
    befores, afters = [record.objective_before for record in history], [record.objective_after for record in history]
    objective.vlines(steps, befores, afters, color="0.7", lw=1)
    objective.plot(steps, befores, "o", color="#0072b2", ms=3, label="before")
    objective.plot(steps, afters, "o", color="#d55e00", ms=3, label="after")
    if history and min(*befores, *afters) > 0:
        objective.set_yscale("log")
    objective.set_ylabel("objective")
    objective.legend(frameon=False, title=f"{len(history)} teleports", fontsize=8, title_fontsize=8)
    far.plot(steps, [record.radius_used for record in history], ".-", color="#009e73", lw=0.8, label="radius used")
    far.plot(steps, [record.condition for record in history], ".-", color="#cc79a7", lw=0.8, label="condition of g")
    far.legend(frameon=False, fontsize=8)
    cost.plot(steps, [1e3 * record.seconds for record in history], ".-", color="0.3", lw=0.8)
    cost.set_ylabel("milliseconds")
    cost.set_xlabel("step")
    for axes in (objective, far, cost):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
