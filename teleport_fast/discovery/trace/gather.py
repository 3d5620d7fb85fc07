"""What follows one unit: the entries of the tape's parameters that move with it, gathered and told apart by place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from teleport_fast.discovery.trace.tape import Tape, Use


@dataclass(frozen=True, order=True)
class Place:
    """An axis of a tensor and how it moves: the exponent of its scale, its shift, the part that its heads cut out."""

    parameter: str
    axis: int
    exponent: float
    shift: float = 0.0
    part_axis: int = -1
    part_size: int = 0
    reads: bool = False


@dataclass
class Follower:
    """What follows one unit: for every place the sorted (index, start of the part)."""

    places: dict[Place, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    flags: int = 0
    seats: set[int] = field(default_factory=set)


def settle(tape: Tape) -> None:
    """A tensor used twice moves once: both uses must ask the same of it, or neither moves."""
    by_parameter: dict[str, dict[int, list[Use]]] = defaultdict(lambda: defaultdict(list))
    for use in tape.uses:
        by_parameter[use.parameter][use.event].append(use)
    for events in by_parameter.values():
        kept: dict[object, list[Use]] = {}  # one event of each shape: the steps of a recurrence are all alike
        for event in events.values():
            shape = tuple((use.axis, tuple(use.index.tolist()), _part(use)) for use in event)
            for other in [kept[shape]] if shape in kept else kept.values():
                _settle_two(tape, other, event)
            kept.setdefault(shape, event)


def _settle_two(tape: Tape, first: list[Use], other: list[Use]) -> None:
    for axis in {use.axis for use in (*first, *other)}:
        ours, theirs = ([use for use in side if use.axis == axis] for side in (first, other))
        if any(_apart(use, other) for use in ours) or any(_apart(use, first) for use in theirs):
            continue
        if len(ours) == len(theirs) == 1 and not _crossed(ours[0], theirs[0]):
            _match(tape, ours[0], theirs[0])
        else:
            for use in (*ours, *theirs):
                tape.units.pin(use.unit, f"{use.parameter!r} is used twice, in different ways")


def _part(use: Use) -> object:
    return None if use.region is None else (use.region[0], tuple(use.region[1].tolist()), use.region[2])


def _crossed(a: Use, b: Use) -> bool:
    """Whether the parts that two uses touch overlap without being one: a move of both would act twice on what they share."""
    if a.region is None or b.region is None:
        return a.region is not b.region
    if (a.region[0], a.region[2]) != (b.region[0], b.region[2]):
        return True
    gaps = (a.region[1].unique()[:, None] - b.region[1].unique()).abs()
    return bool(((gaps > 0) & (gaps < a.region[2])).any())


def _apart(a: Use, event: list[Use]) -> bool:
    """Whether `a` uses a part of its tensor that the other event does not touch."""
    if a.region is None:
        return False
    axis, starts, size = a.region
    ours = {i for start in set(starts.tolist()) for i in range(start, start + size)}
    for b in event:
        if b.region is not None and b.region[0] == axis:
            theirs = {i for start in set(b.region[1].tolist()) for i in range(start, start + b.region[2])}
        elif b.axis == axis:
            theirs = set(b.index.tolist())
        else:
            continue
        return ours.isdisjoint(theirs)
    return False


def _match(tape: Tape, a: Use, b: Use) -> None:
    there = dict(zip(b.index.tolist(), b.unit.tolist(), strict=True))
    pairs = [(u, there[i]) for i, u in zip(a.index.tolist(), a.unit.tolist(), strict=True) if i in there]
    if pairs:
        left, right = torch.tensor(pairs).T
        tape.units.tie(left, right, b.exponent / a.exponent)


def gather(tape: Tape, scales: bool) -> dict[int, Follower]:
    """Everything that moves with one scale (or one seat), by its root."""
    units = tape.units
    found: dict[int, Follower] = defaultdict(Follower)
    asked: dict[tuple[int, Place, int, int, int], float] = defaultdict(float)
    for use in tape.uses:
        if use.parameter in tape.opaque:
            units.pin(use.unit, f"{use.parameter!r}: {tape.opaque[use.parameter]}")
    for use in tape.uses:
        part, starts = (-1, 0), [0] * len(use.index)
        if use.region is not None:
            part, starts = (use.region[0], use.region[2]), use.region[1].tolist()
        place = Place(use.parameter, use.axis, 0.0, use.shift if scales else 0.0, *part, scales and use.exponent < 0)
        for index, unit, start in zip(use.index.tolist(), use.unit.tolist(), starts, strict=True):
            seat = units.seat(unit)
            root, exponent = units.scale(unit) if scales else (seat, 0.0)
            found[root].seats.add(seat)
            if scales:
                found[root].flags |= units.scale_flags(root)
            # two terms of one product add up; the same entry asked for by two operators is one
            asked[root, place, index, start, use.event if scales else 0] += use.exponent * exponent
    for (root, place, index, start, _), exponent in asked.items():
        if exponent or not scales:
            found[root].places[replace(place, exponent=exponent)].append((index, start))
    for group in found.values():
        group.places = {place: sorted(set(at)) for place, at in group.places.items()}
    return found


def part_starts(groups: Sequence[Follower]) -> dict[tuple[str, int], set[int]]:
    """The starts at which any unit uses a part of a tensor: one start alone needs no cut."""
    starts: dict[tuple[str, int], set[int]] = defaultdict(set)
    for group in groups:
        for place, at in group.places.items():
            if place.part_axis >= 0:
                starts[place.parameter, place.axis] |= {start for _, start in at}
    return starts


def merge_parts(
    places: dict[Place, list[tuple[int, int]]], starts: dict[tuple[str, int], set[int]], tape: Tape
) -> dict[Place, list[tuple[int, int]]]:
    """Parts that together are the whole tensor, or that nothing is told apart from, become the whole."""
    merged: dict[Place, list[tuple[int, int]]] = {}
    for place, at in places.items():
        size = tape.tensors[place.parameter].shape[place.part_axis] if place.part_axis >= 0 else 0
        by_index: dict[int, set[int]] = defaultdict(set)
        for index, start in at:
            by_index[index].add(start)
        lone = len(starts.get((place.parameter, place.axis), ())) == 1 and tape.events(place.parameter) == 1
        if size and (lone or all(len(s) * place.part_size >= size for s in by_index.values())):
            place = replace(place, part_axis=-1, part_size=0)
            at = [(index, 0) for index in by_index]
        merged[place] = sorted(set(merged.get(place, [])) | set(at))
    return merged
