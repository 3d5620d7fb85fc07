"""Which buckets are searched before the first of them moves, and which of the elements found may be used (docs/adr/0005)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teleport_fast.called import unless
from teleport_fast.objectives import Move, Objective
from teleport_fast.soundness import refusal, remembered, restore
from teleport_fast.symmetry.bucket import Bucket, Element, Split, meet
from teleport_fast.whole import Whole

Numbered = tuple[int, Bucket]
Sound = tuple[int, Bucket, Element | Split, Tensor]


class Waves:
    """Runs of buckets of which none reads what another of its run moves."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], list[list[int]]] = {}

    def of(self, objective: Objective, serving: Sequence[Numbered]) -> list[list[Numbered]]:
        if not objective.reads_tensors:
            return [[*serving]]
        key, numbered = tuple(index for index, _ in serving), dict(serving)
        if key not in self._known:
            waves: list[list[int]] = [[]]
            for index, bucket in serving:
                if any(meet(bucket, numbered[other]) for other in waves[-1]):
                    waves.append([])
                waves[-1].append(index)
            self._known[key] = waves
        return [[(index, numbered[index]) for index in wave] for wave in self._known[key]]


def search(
    place: Whole, objective: Objective, wave: Sequence[Numbered], move: Move, void: Tensor | None, warn: Callable[[str], None]
) -> list[Sound]:
    """The elements of a wave's buckets that may be used, with their radii; why another may not is said."""
    sound: list[Sound] = []
    # many ranks share one reduction for all buckets; one process can go on after a search that fails
    for run in [wave] if place.sharded else [[one] for one in wave]:
        found = place.elements(objective, run, move)
        while True:
            memory, index, bucket = remembered(objective), *run[0]
            try:
                index, bucket, chosen = next(found)
                if chosen is None:
                    continue
                element, used = chosen
                if void is not None:
                    sound.append((index, bucket, unless(void, element, move.max_condition), used))
                    continue
                reason = refusal(bucket, element, move.max_condition)
                if reason is None:
                    sound.append((index, bucket, element, used))
                    continue
            except StopIteration:
                break
            except torch.linalg.LinAlgError as error:
                reason = f"joint {bucket.joints[0].name!r} or one searched with it: the search failed ({str(error).splitlines()[0]})"
            restore(objective, memory)
            warn(f"{reason}, the joint stays")
    return sound
