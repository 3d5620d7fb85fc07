"""The picture of a model's joints: parameters are rows, joints are columns that tie what writes a space to what reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries, named_tensors

MOST_ROWS = 150
SUFFIXES = (".png", ".svg", ".pdf")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True)
class Row:
    """A parameter, or the same parameter of `count` equal blocks."""

    template: str
    shape: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Column:
    """A joint, or the same joint of `count` equal blocks: the rows that it writes and reads."""

    template: str
    kind: str
    label: str
    count: int
    plus: frozenset[Row]
    minus: frozenset[Row]


def layout(model: nn.Module, symmetries: Symmetries) -> tuple[list[Row], list[Column]]:
    """Rows and columns of the picture: blocks that differ in their index alone are drawn once, with their number.

    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)))
    >>> rows, columns = layout(model, tf.find_symmetries(model))
    >>> [(row.template, row.count) for row in rows][0], [(c.template, c.count) for c in columns][0]
    (('*.0.weight', 3), ('*.*.up-down', 3))
    """
    tensors = named_tensors(model)
    rows = _rows(tensors)
    columns: dict[tuple[object, ...], Column] = {}
    for joint in symmetries:
        plus = frozenset(rows[view.parameter] for view in joint.plus)
        minus = frozenset(rows[view.parameter] for view in joint.minus)
        key = (_template(joint.name, plus | minus), joint.kind, str(joint.group), joint.heads, plus, minus)
        count = columns[key].count + 1 if key in columns else 1
        columns[key] = Column(str(key[0]), joint.kind, _label(joint), count, plus, minus)
    return list(dict.fromkeys(rows.values())), list(columns.values())


def draw(model: nn.Module, symmetries: Symmetries, path: Path) -> None:
    """Draw the joints into `path` (.png, .svg or .pdf): ▲ what a joint writes, ▽ what reads it, ◆ both in one tensor.

    Errors: ValueError for another suffix; ModuleNotFoundError that says how to install matplotlib.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"picture must end in {', '.join(SUFFIXES)}, got {path.name!r}; for example joints.svg")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the picture needs matplotlib; pip install matplotlib") from error

    rows, columns = layout(model, symmetries)
    hidden, rows = len(rows) - MOST_ROWS, rows[:MOST_ROWS]
    place = {row: -index for index, row in enumerate(rows)}
    figure = Figure(figsize=(5.5 + 0.34 * len(columns), 3.4 + 0.19 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(column.kind for column in columns))
    for index, column in enumerate(columns):
        _draw_column(axes, index, column, place, f"C{kinds.index(column.kind) % 10}")
    for index in range(1, len(rows), 2):
        axes.axhspan(-index - 0.5, -index + 0.5, color="0.96", zorder=0)
    axes.set_yticks(list(place.values()), [_row_label(row) for row in rows], fontsize=7, family="monospace")
    labels = [column.label + (f"  ×{column.count}" if column.count > 1 else "") for column in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=60, ha="left", fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xlim(-0.7, max(len(columns), 1) - 0.3)
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    for side in axes.spines.values():
        side.set_visible(False)
    lines = [axes.plot([], [], "-", color=f"C{kinds.index(kind) % 10}", label=kind)[0] for kind in kinds]
    if lines:
        figure.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    total = sum(tensor.numel() for tensor in named_tensors(model).values())
    more = f"; {hidden} more rows are not drawn" if hidden > 0 else ""
    axes.set_title(
        f"{type(model).__name__}: {len(symmetries)} joints, {symmetries.dim:,} symmetric dimensions of {total:,} "
        f"parameters{more}\n▲ writes the space   ▽ reads it   ◆ both",
        fontsize=8,
        loc="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_column(axes: Any, x: int, column: Column, place: Mapping[Row, int], color: str) -> None:
    shown = [place[row] for row in column.plus | column.minus if row in place]
    if not shown:
        return
    axes.plot([x, x], [min(shown), max(shown)], "-", color=color, linewidth=1.2, zorder=1)
    sides = (
        (column.plus - column.minus, "^", color),
        (column.minus - column.plus, "v", "white"),
        (column.plus & column.minus, "D", color),
    )
    for side, marker, fill in sides:
        heights = [place[row] for row in side if row in place]
        axes.scatter(
            [x] * len(heights), heights, s=26, marker=marker, facecolors=fill, edgecolors=color, linewidths=1.1, zorder=2
        )


def _rows(tensors: Mapping[str, Tensor]) -> dict[str, Row]:
    """Parameter name → row; names that differ in block indices alone, with equal shapes, share one."""
    keys = {name: (_INDEX.sub("*", name), tuple(tensor.shape)) for name, tensor in tensors.items()}
    owners: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, key in keys.items():
        owners.setdefault(key, []).append(name)
    rows = {}
    for (_, shape), names in owners.items():
        row = Row(_common(names), shape, len(names))
        rows.update(dict.fromkeys(names, row))
    return rows


def _common(names: list[str]) -> str:
    """The name with a star for every index in which the names differ."""
    if len(names) == 1:
        return names[0]
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def _template(name: str, rows: frozenset[Row]) -> str:
    return _INDEX.sub("*", name) if all(row.count > 1 for row in rows) else name


def _label(joint: Joint) -> str:
    return f"{joint.kind} {joint.group}" + (f" · {joint.heads} heads" if joint.heads > 1 else "")


def _row_label(row: Row) -> str:
    repeated = f" ×{row.count}" if row.count > 1 else ""
    return f"{row.template}{repeated}  {'×'.join(map(str, row.shape)) or 'scalar'}"
