"""A study's outcome on the terminal, as JSON and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Shown

from teleport_fast.experiments.picture import COLOURS, require_matplotlib
from teleport_fast.experiments.report import finite, versions
from teleport_fast.experiments.studies.study import Cell, Curve, Outcome, Panel, Sample, Table, number


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Title, tables, claims: what holds and what does not in the same words."""
    console.print(f"[bold]{escape(outcome.title)}[/] ({escape(outcome.source)})", highlight=False)
    for table in outcome.tables:
        console.print(_shown(table))
    for claim in outcome.claims:
        verdict = "[green]holds[/]" if claim.holds else "[bold red]does not hold[/]"
        line = escape(f"{claim.text}: {claim.measured} (bar: {claim.bar})")
        console.print(f"{verdict}: {line}", highlight=False, soft_wrap=True)


def cell(value: Cell) -> str:
    """A cell's text.

    >>> cell(0.5), cell("sgd"), cell(Sample((1.0, 3.0)))
    ('0.5', 'sgd', '2 ± 1.4')
    """
    return number(value) if isinstance(value, (int, float)) else str(value)


def _shown(table: Table) -> Shown:
    shown = Shown(title=escape(table.title), title_justify="left", title_style="")
    for index, column in enumerate(table.columns):
        shown.add_column(escape(column), justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in table.rows:
        shown.add_row(*(escape(cell(value)) for value in row))
    return shown


def markdown(table: Table) -> str:
    """The table as the documentation shows it.

    >>> print(markdown(Table("t", ("a", "b"), (("x", 1.0),))))
    | a | b |
    | --- | --- |
    | x | 1 |
    """
    lines = [table.columns, ["---"] * len(table.columns), *([cell(value) for value in row] for row in table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(outcome: Outcome, command: str, seconds: float) -> dict[str, Any]:
    """Everything: command, versions, settings, tables with every seed's value, curves, claims."""
    tables = [
        {"title": table.title, "columns": table.columns, "rows": [[_plain(value) for value in row] for row in table.rows]}
        for table in outcome.tables
    ]
    everything = {
        "name": outcome.name, "title": outcome.title, "source": outcome.source, "command": command, "seconds": round(seconds, 1),
        "versions": versions(), "settings": _keyed(outcome.settings), "claims": [asdict(claim) for claim in outcome.claims],
        "tables": tables, "panels": [_short(asdict(panel)) for panel in outcome.panels],
    }
    plain: dict[str, Any] = finite(everything)
    return plain


def _plain(value: Cell) -> Any:
    if isinstance(value, Sample):
        return {"mean": value.mean, "sd": value.sd, "median": value.median, "values": value.values, "shown": str(value)}
    return value


def _keyed(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _keyed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_keyed(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _short(value: Any) -> Any:
    """Curves to six digits, so that the file can be checked in."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def draw(outcome: Outcome, path: Path) -> None:
    """The panels side by side as a PNG: each curve the median over the seeds, its band from the lowest to the highest."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(3, len(outcome.panels)) or 1
    down = max(1, math.ceil(len(outcome.panels) / across))
    figure = Figure(figsize=(5.2 * across, 4.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{outcome.title}\n{outcome.source}", fontsize=9)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes, panel in zip(grid, outcome.panels, strict=False):
        _draw_panel(axes, panel)
    for axes in grid[len(outcome.panels):]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110, format="png")


def _draw_panel(axes: Any, panel: Panel) -> None:
    for index, curve in enumerate(panel.curves):
        colour = COLOURS[index % len(COLOURS)]
        style = ("-", "--", "-.", ":")[index % 4]
        if panel.scatter:
            xs = [x for run in curve.runs for x in curve.x[: len(run)]]
            axes.scatter(xs, [y for run in curve.runs for y in run], s=12, color=colour, label=curve.label, alpha=0.7)
            continue
        xs, low, middle, high = _band(curve, panel.log_y)
        axes.plot(xs, middle, color=colour, label=curve.label, lw=1.4, ls=style)
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)


def _band(curve: Curve, log_y: bool) -> tuple[list[float], Sequence[float], Sequence[float], Sequence[float]]:
    """x, lowest, median and highest of the finite runs; what a logarithm cannot show is left out."""
    points = []
    for index, x in enumerate(curve.x):
        ys = [run[index] for run in curve.runs if index < len(run) and math.isfinite(run[index])]
        ys = [y for y in ys if y > 0] if log_y else ys
        if ys:
            points.append((x, min(ys), statistics.median(ys), max(ys)))
    xs, low, middle, high = zip(*points, strict=True) if points else ((), (), (), ())
    return list(xs), low, middle, high
