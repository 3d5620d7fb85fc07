"""From the tape to candidates: units that are used alike become a joint, their indices become views."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from teleport_fast.discovery.candidates import Candidate
from teleport_fast.discovery.trace.gather import Follower, Place, gather, merge_parts, part_starts, settle
from teleport_fast.discovery.trace.tape import Tape
from teleport_fast.discovery.trace.units import BENT, FIXED, LINKED, MIXED, PINNED, POSITIVE
from teleport_fast.symmetry.diagonal_groups import Diagonal, Permutation, PositiveDiagonal
from teleport_fast.symmetry.groups import GeneralLinear, Group
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View

REFUTED = "the recorded call proposes it, the probe refutes it"


def candidates(tape: Tape) -> Iterator[Candidate]:
    """Dense and diagonal joints, then permutations, in the order of the parameters that they move first."""
    settle(tape)
    order = {name: i for i, name in enumerate(tape.tensors)}
    scaled = [g for g in gather(tape, True).values() if not g.flags & FIXED and g.places]
    mixed: set[int] = set()  # seats of dense joints, of which a permutation is one element
    for like in _alike(tape, scaled, order, split=True):
        candidate = _scale_candidate(tape, like)
        if candidate is None:
            continue
        if candidate.alternatives and candidate.alternatives[0].group.form == "dense":
            mixed |= {seat for units in like for unit in units for seat in unit.seats}
        yield candidate
    seated = gather(tape, False)
    free = [g for root, g in seated.items() if not tape.units.seat_flags(root) & PINNED and g.places]
    for like in _alike(tape, free, order, split=False):
        candidate = _seat_candidate(tape, like)
        if candidate is not None and not all(unit.seats <= mixed for units in like for unit in units):
            yield candidate


def _dense(tape: Tape, group: Follower) -> bool:
    places = group.places
    return (
        len(group.seats) == 1
        and not any(tape.units.seat_flags(s) & BENT for s in group.seats)
        and not group.flags & POSITIVE
        and all(abs(p.exponent) == 1 and not p.shift for p in places)
        and {p.exponent for p in places} == {1.0, -1.0}
    )


def _alike(tape: Tape, groups: Sequence[Follower], order: dict[str, int], split: bool) -> list[list[list[Follower]]]:
    """Groups that the same places follow, cut into blocks: [joint][block][unit], each sorted by its first index."""
    whole = part_starts(groups)
    classes: dict[object, dict[object, list[Follower]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        group.places = merge_parts(group.places, whole, tape)
        if split:
            group.places = _normalised(group.places, order)
        signature = tuple(sorted((p, len(at)) for p, at in group.places.items()))
        block = tuple(sorted({tape.units.block(seat) for seat in group.seats}))
        flags = group.flags & POSITIVE
        classes[signature, flags, _dense(tape, group) if split else None][block].append(group)
    joints = []
    for blocks in classes.values():
        first = min(next(iter(blocks.values()))[0].places, key=lambda p: (order[p.parameter], p.axis))
        rows = [sorted(units, key=lambda g: g.places[first][0]) for units in blocks.values()]
        rows.sort(key=lambda units: units[0].places[first][0])
        sizes = {len(units) for units in rows}
        joints += [rows] if len(sizes) == 1 else [[units for units in rows if len(units) == n] for n in sorted(sizes)]
    first_of = lambda rows: min(order[p.parameter] for p in rows[0][0].places)  # noqa: E731
    return sorted(joints, key=first_of)


def _normalised(
    places: dict[Place, list[tuple[int, int]]], order: dict[str, int]
) -> dict[Place, list[tuple[int, int]]]:
    """Exponents counted from the first writer's (queries before keys)."""
    first = min(places, key=lambda p: (p.reads, order[p.parameter], p.axis, places[p][0]))
    return {replace(p, exponent=p.exponent / first.exponent): at for p, at in places.items()}


def _views(tape: Tape, rows: list[list[Follower]], places: Sequence[Place]) -> list[View] | None:
    """One view per place (or several, where one does not reach), None where indices follow no stride."""
    heads, width = len(rows), len(rows[0])
    views: list[View] = []
    for place in places:
        table = torch.tensor([[unit.places[place] for unit in units] for units in rows])
        index, start = table[..., 0], table[..., 1]
        views_here = _strided(tape, place, index, start, heads, width)
        if views_here is None:
            return None
        views += views_here
    return views


def _strided(tape: Tape, place: Place, index: Tensor, start: Tensor, heads: int, width: int) -> list[View] | None:
    many = index.shape[2]
    first = int(index[0, 0, 0])
    step = int(index[0, 1, 0]) - first if width > 1 else 1
    head = int(index[1, 0, 0]) - first if heads > 1 else width * many
    repeat = int(index[0, 0, 1]) - first if many > 1 else width
    h, u, r = torch.arange(heads), torch.arange(width), torch.arange(many)
    wanted = first + h[:, None, None] * head + u[None, :, None] * step + r * repeat
    if step < 1 or not torch.equal(wanted, index):
        if many == 1:
            return None
        parts = [_strided(tape, place, index[..., i : i + 1], start[..., i : i + 1], heads, width) for i in range(many)]
        return None if any(part is None for part in parts) else [view for part in parts if part for view in part]
    counts = tape.tensors[place.parameter].ndim > 1
    power = abs(place.exponent) or 1.0
    make = partial(
        View, place.parameter, place.axis, heads, width, first, width_stride=step, power=power, shift=place.shift, counts=counts
    )
    if place.part_axis < 0:
        if head < 0 or repeat < 0:
            return None
        return [make(head_stride=head, repeats=many, repeat_stride=repeat)]
    begin = int(start[0, 0, 0])
    apart = int(start[1, 0, 0]) - begin if heads > 1 else place.part_size
    if many > 1 or (head > 0 and heads > 1) or not torch.equal(begin + h[:, None, None] * apart + 0 * start, start):
        return None
    return [make(head_axis=place.part_axis, head_start=begin, head_stride=apart, head_size=place.part_size)]


def _sides(tape: Tape, rows: list[list[Follower]], scales: bool) -> tuple[tuple[View, ...], ...] | None:
    order = {name: i for i, name in enumerate(tape.tensors)}  # weights first: a bias alone may be blind to a wrong move
    places = sorted(rows[0][0].places, key=lambda p: (-tape.tensors[p.parameter].ndim, order[p.parameter], p))
    buffers = {name for name in tape.buffers.values()}
    carried = [p for p in places if p.parameter in buffers]
    moved = [p for p in places if p.parameter not in buffers]
    if scales:
        sides = ([p for p in moved if p.exponent > 0], [p for p in moved if p.exponent < 0], carried)
    else:
        written = {(use.parameter, use.axis) for use in tape.uses if use.exponent > 0}
        sides = (
            [p for p in moved if (p.parameter, p.axis) in written],
            [p for p in moved if (p.parameter, p.axis) not in written],
            carried,
        )
    out = []
    for side in sides:
        views = _views(tape, rows, side)
        if views is None:
            return None
        out.append(tuple(views))
    return tuple(out)


def _together(tape: Tape, rows: list[list[Follower]], scales: bool) -> list[list[Follower]]:
    """Blocks as one head where strides allow it; a diagonal need not keep heads apart."""
    first = min(rows[0][0].places)
    flat = [sorted((unit for units in rows for unit in units), key=lambda g: g.places[first][0])]
    return flat if len(rows) > 1 and _sides(tape, flat, scales) is not None else rows


def _scale_candidate(tape: Tape, rows: list[list[Follower]]) -> Candidate | None:
    if not _dense(tape, rows[0][0]):
        rows = _together(tape, rows, True)
    sides = _sides(tape, rows, True)
    if sides is None:
        return _no_view(rows, "up-down")
    if not sides[0] or not (sides[1] or sides[2]):
        return None
    plus, minus, carried = sides
    heads, width = len(rows), len(rows[0])
    kind, name = _kind(tape, rows, plus, minus, carried)
    groups: list[Group] = [] if rows[0][0].flags & POSITIVE else [Diagonal(width)]
    groups.append(PositiveDiagonal(width))
    if _dense(tape, rows[0][0]):
        groups = [GeneralLinear(width), *groups[:1]]
    joints = tuple(Joint(name, kind, group, heads, width, plus, minus, carried) for group in groups)
    return Candidate(name, kind, joints, REFUTED, known=True)


def _no_view(rows: list[list[Follower]], kind: str) -> Candidate:
    first = min(rows[0][0].places).parameter
    reason = f"the entries of {first!r} and of what reads them follow no common stride, so that no view describes them"
    return Candidate(f"{_module(first)}.{kind}", kind, (), reason)


def _seat_candidate(tape: Tape, rows: list[list[Follower]]) -> Candidate | None:
    heads, width = len(rows), len(rows[0])
    sides = _sides(tape, rows, False)
    if width < 2 or (sides is not None and not sides[0]):
        return None
    if sides is None:
        return _no_view(rows, "neurons")
    plus, minus, carried = sides
    kind = "channels" if any(tape.tensors[view.parameter].ndim > 2 for view in plus) else "neurons"
    name = f"{_module((minus or plus)[0].parameter)}.{kind}"
    joint = Joint(name, kind, Permutation(width), heads, width, plus, minus, carried)
    return Candidate(name, kind, (joint,), REFUTED, known=True)


def _kind(
    tape: Tape, rows: list[list[Follower]], plus: Sequence[View], minus: Sequence[View], carried: Sequence[View]
) -> tuple[str, str]:
    flags = 0
    for seat in rows[0][0].seats:
        flags |= tape.units.seat_flags(seat)
    writers, readers = [v.parameter for v in plus], [v.parameter for v in minus]
    if carried:
        return "batchnorm-scale", f"{_module(writers[0])}.batchnorm-scale"
    if _dense(tape, rows[0][0]) and flags & (LINKED | MIXED):
        kind = "query-key" if flags & LINKED else "value-output"
        return kind, ".".join(filter(None, (_common(writers + readers), kind)))
    if all(tape.tensors[name].ndim == 1 for name in writers):
        return "norm-readers", f"{_module(writers[0])}.readers"
    if all(tape.tensors[name].ndim == 1 for name in readers):
        return "layer-scale", f"{_module(writers[0])}.layer-scale"
    squared = any(view.power != 1 for view in (*plus, *minus))
    return "up-down-squared" if squared else "up-down", f"{_module(readers[0])}.up-down"


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _common(parameters: Sequence[str]) -> str:
    """The innermost module that holds all of these parameters."""
    leaves = [name.split(".") for name in parameters]
    paths = [leaf[:-2] if leaf[-1] in ("weight", "bias") else leaf[:-1] for leaf in leaves]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
