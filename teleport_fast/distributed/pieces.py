"""Which part of a view one rank holds: the heads and units of it, as views of the local tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, cast

from teleport_fast.distributed.layout import Layout, Run
from teleport_fast.symmetry.view import View

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

Span = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A view of the local tensor that shows these heads and units (first, one past the last) of the whole view."""

    view: View
    heads: Span
    units: Span


@lru_cache(maxsize=8192)
def pieces(view: View, layout: Layout) -> tuple[Piece, ...]:
    """What this rank holds of a view, in the order of its heads; columns that lie on other ranks are no matter of pieces."""
    return tuple(_pieces(view, layout, layout.runs))


def _pieces(view: View, layout: Layout, runs: Sequence[tuple[Run, ...]]) -> Iterator[Piece]:
    axis = view.axis % len(layout.shape)
    if not all(runs):  # an empty part
        return
    if view.head_axis is not None and not _whole(runs[view.head_axis], layout.shape[view.head_axis]):
        for run in runs[view.head_axis]:
            for piece in _cut_heads(view, run):
                yield from _cut_units(piece, runs[axis], layout.shape[axis])
        return
    yield from _cut_units(Piece(view, (0, view.heads), (0, view.width)), runs[axis], layout.shape[axis])


def _whole(runs: tuple[Run, ...], size: int) -> bool:
    return runs == (Run(0, size, 0),)


def _cut_heads(view: View, run: Run) -> Iterator[Piece]:
    """Heads on an axis of their own: whole ones together, one that the run cuts by itself, with fewer columns."""
    spans: list[tuple[int, int, int]] = []
    for head in range(view.heads):
        begin = view.head_start + head * view.head_stride
        low, high = max(begin, run.start), min(begin + view.head_size, run.stop)
        if low < high:
            spans.append((head, low - begin, high - begin))
    at = 0
    while at < len(spans):
        head, low, high = spans[at]
        end = at + 1
        while end < len(spans) and spans[end] == (head + end - at, low, high):
            end += 1
        start = view.head_start + head * view.head_stride + low - run.start + run.offset
        part = replace(view, heads=end - at, head_start=start, head_size=high - low)
        yield Piece(part, (head, head + end - at), (0, view.width))
        at = end


def _cut_units(piece: Piece, runs: tuple[Run, ...], size: int) -> Iterator[Piece]:
    if _whole(runs, size):
        yield piece
        return
    for run in runs:
        rows = [tuple(_segments(piece.view, head, run)) for head in range(_rows(piece.view))]
        at = 0
        while at < len(rows):
            end = at + 1
            while end < len(rows) and rows[end] == rows[at]:
                end += 1
            for repeats, units in rows[at]:
                yield _sub_piece(piece, (at, end), repeats, units, run)
            at = end


def _rows(view: View) -> int:
    """Heads that lie on the view's axis: all of them, or one where they have an axis of their own."""
    return view.heads if view.head_axis is None else 1


def _segments(view: View, head: int, run: Run) -> Iterator[tuple[Span, Span]]:
    """(repeats, units) of one head that a run holds, neighbouring repeats of the same units together."""
    begin = view.start + (head * view.head_stride if view.head_axis is None else 0)
    open_at, open_units = 0, (0, 0)
    for repeat in range(view.repeats + 1):
        units = (0, 0)
        if repeat < view.repeats:
            base = begin + repeat * view.repeat_stride
            low = max(0, -(-(run.start - base) // view.width_stride))
            high = min(view.width, -(-(run.stop - base) // view.width_stride))
            units = (low, high) if low < high else (0, 0)
        if units != open_units:
            if open_units != (0, 0):
                yield (open_at, repeat), open_units
            open_at, open_units = repeat, units


def _sub_piece(piece: Piece, heads: Span, repeats: Span, units: Span, run: Run) -> Piece:
    view = piece.view
    start = view.start + repeats[0] * view.repeat_stride + units[0] * view.width_stride - run.start + run.offset
    count, shown = view.heads, piece.heads
    if view.head_axis is None:
        start += heads[0] * view.head_stride
        count, shown = heads[1] - heads[0], (piece.heads[0] + heads[0], piece.heads[0] + heads[1])
    part = replace(view, start=start, heads=count, width=units[1] - units[0], repeats=repeats[1] - repeats[0])
    return Piece(part, shown, units)


@lru_cache(maxsize=8192)
def is_cut(view: View, layout: Layout) -> bool:
    """Whether some rank holds some of one head's units and not the others; the same answer on every rank."""
    boundaries = layout.boundaries(view.axis)
    for head in range(_rows(view)):
        for repeat in range(view.repeats):
            base = view.start + repeat * view.repeat_stride
            base += head * view.head_stride if view.head_axis is None else 0
            last = base + (view.width - 1) * view.width_stride
            if any(base < boundary <= last for boundary in boundaries):
                return True
    return False


def uncut(views: Iterable[View], layout: Layout) -> tuple[Placement, ...]:
    """Placements under which no rank holds a part of a head: the fewest cuts of the views' axes go to another dimension.

    The other dimension is the longest that nothing cuts; where there is none, the tensor is replicated over those ranks.
    """
    from torch.distributed.tensor import Replicate, Shard

    views = list(views)
    axes = {view.axis % len(layout.shape) for view in views}
    free = [dim for dim in range(len(layout.shape)) if dim not in axes and not layout.cutting(dim)]
    to: Placement = Shard(max(free, key=lambda dim: layout.shape[dim])) if free else Replicate()
    cutting = layout.cutting(*axes)
    for count in range(1, len(cutting) + 1):
        for chosen in combinations(cutting, count):
            placements = [to if m in chosen else placement for m, placement in enumerate(layout.placements)]
            kept = [placements[m] for m in cutting if m not in chosen]
            if any(type(placement).__name__ == "_StridedShard" for placement in kept):
                continue  # its stride is over a cut that would no longer be there
            if count > 1 and free:  # two cuts of one dimension would need an order: one moves, the others gather
                placements = [to if m == chosen[0] else Replicate() if m in chosen else p for m, p in enumerate(layout.placements)]
            if not any(is_cut(view, replace(layout, placements=tuple(placements))) for view in views):
                return tuple(placements)
    return tuple(cast(Any, Replicate()) for _ in layout.placements)
