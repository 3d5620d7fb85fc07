"""The roofline of a run, a panel per op: share of the BLAS's flops against intensity, both over peaks measured in the same round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teleport_fast.experiments.picture import COLOURS, require_matplotlib

ROUTES = {"torch": (COLOURS[1], "s"), "cpp": (COLOURS[2], "o")}


def draw(run: dict[str, Any], path: Path) -> None:
    """Writes a PNG; ModuleNotFoundError with the remedy without matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(row["op"] for row in run["rows"]))
    columns = min(4, len(ops))
    lines = -(-len(ops) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    lowest = min(row["intensity"]["median"] for row in run["rows"])
    xs = [lowest / 2, 1.0, max(10.0, *(2 * row["intensity"]["median"] for row in run["rows"]))]
    shown = [row["routes"][route]["of_blas"]["median"] for row in run["rows"] for route in ROUTES if route in row["routes"]]
    for place, axis in enumerate(axes):
        if place >= len(ops):
            axis.set_visible(False)
            continue
        axis.plot(xs, [min(1.0, x) for x in xs], color=COLOURS[0], lw=0.8)
        for row in run["rows"]:
            if row["op"] != ops[place]:
                continue
            for route, (colour, mark) in ROUTES.items():
                if route in row["routes"]:
                    found, filled = row["routes"][route]["of_blas"], row["dtype"] == "float32"
                    axis.plot(
                        row["intensity"]["median"], max(found["median"], 1e-9), mark, ms=5, color=colour,
                        mfc=colour if filled else "none", label=route if filled else None,
                    )  # fmt: skip
        axis.set_title(ops[place], fontsize="small")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(min(shown) / 2, 3.0)
    handles, names = axes[0].get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axes[0].legend(unique.values(), unique.keys(), fontsize="x-small", loc="lower right")
    figure.supxlabel("the BLAS's time for its operations over a copy's time for its bytes (1: both bound alike)", fontsize="small")
    figure.supylabel("share of the BLAS's flops", fontsize="small")
    figure.suptitle(f"Roofline, one thread, {run['machine']['cpu']}; filled: float32, hollow: other dtypes", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
