"""The picture of a growth run: a column per sweep, time over its first above, memory over the parameters' below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teleport_fast.experiments.picture import COLOURS, require_matplotlib


def draw(run: dict[str, Any], path: Path) -> None:
    """Writes a PNG; ModuleNotFoundError with the remedy without matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sweeps = list(dict.fromkeys(row["sweep"] for row in run["rows"]))
    figure = Figure(figsize=(3.4 * len(sweeps), 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(sweeps), squeeze=False)
    for place, sweep in enumerate(sweeps):
        rows = [row for row in run["rows"] if row["sweep"] == sweep and "value" in row]
        fitted = next((row for row in run["rows"] if row["sweep"] == sweep and "exponents" in row), None)
        xs = [row["parameters"] if sweep == "parameters" else row["value"] for row in rows]
        for colour, name in zip(COLOURS, rows[0]["over_first"], strict=False):
            slope = f" ^{fitted['exponents'][name]:.2f}" if fitted else ""
            axes[0][place].plot(xs, [row["over_first"][name] for row in rows], "o-", ms=4, color=colour, label=f"{name}{slope}")
            if name in rows[0]["memory"]:
                axes[1][place].plot(xs, [max(1e-4, row["memory"][name]) for row in rows], "o-", ms=4, color=colour, label=name)
        for axis in (axes[0][place], axes[1][place]):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(xs, [f"{x / 1e6:.3g}M" if sweep == "parameters" else str(x) for x in xs])
            axis.minorticks_off()
            axis.legend(fontsize="x-small")
        axes[1][place].set_xlabel(sweep)
    axes[0][0].set_ylabel("time over the sweep's first")
    axes[1][0].set_ylabel("peak memory over the parameters")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
