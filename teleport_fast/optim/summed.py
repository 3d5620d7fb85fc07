"""Gradient covariances of matrices that are sharded: each rank's own summand, one bucketed all-reduce, the same sum everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teleport_fast.distributed.blocks import Spread, exchange
from teleport_fast.distributed.gradient import gradient_part
from teleport_fast.distributed.layout import Over
from teleport_fast.distributed.reduce import all_reduce_
from teleport_fast.ops.gram_difference import gram_difference
from teleport_fast.optim.assigned import Owner, Place
from teleport_fast.optim.sharded import Placing, rows_of
from teleport_fast.optim.sides import Side
from teleport_fast.optim.views import part_bounds, view_of

# Entries of the Grams that are summed in one all-reduce: 256 MB in float32.
BUCKET_ENTRIES = 2**26


class Held:
    """One step's gradients as this rank holds them: where the parameter lies, and at work where a side is turned there."""

    def __init__(self, groups: list[dict[str, Any]], places: Sequence[Place], placings: Mapping[Place, Placing | None]) -> None:
        self.placings = placings
        parameters = {place: groups[place[0]]["params"][place[1]] for place in places}
        self.home = {place: gradient_part(p) for place, p in parameters.items()}
        away = {place: placing for place in places if (placing := placings.get(place)) and placing.works_elsewhere}
        moved = exchange([self.home[place] for place in away], [(p.home, p.work) for p in away.values()])
        self.work = dict(zip(away, moved, strict=True))

    def at(self, place: Place, spread: Spread) -> Tensor:
        """The gradient in one of its placing's layouts."""
        placing = self.placings[place]
        return self.work[place] if placing is not None and spread is placing.work and not placing.stays else self.home[place]


@dataclass
class Due:
    """A basis' covariance: its sides, the dtype that it is computed in, and whose turn it is among the columns."""

    sides: list[tuple[Owner, Side]]
    dtype: torch.dtype
    turn: int


def buckets_of(due: Mapping[Owner, Due]) -> Iterator[dict[Owner, Due]]:
    """Bases whose covariances are summed together: all of a small model, some of a large one, whose Grams take room."""
    bucket: dict[Owner, Due] = {}
    entries = 0
    for owner, basis in due.items():
        count = sum(side.entries for _, side in basis.sides)
        if bucket and entries + count > BUCKET_ENTRIES:
            yield bucket
            bucket, entries = {}, 0
        bucket[owner] = basis
        entries += count
    if bucket:
        yield bucket


def normalised_grams(due: Mapping[Owner, Due], held: Held, parts: int, normalise: str) -> dict[Owner, Tensor]:
    """Σ G Gᵀ/‖G‖² of each basis over all ranks, (heads, h, h), the same bits on every rank.

    normalise: as in `covariance_`; sums that are zero or not finite count as zero. Matrices that share a basis under
    "tensor" need their ‖G‖² first, in one more all-reduce of a number each.
    """
    grams = {
        owner: [_gram(held, place, side, basis, parts) for place, side in basis.sides] for owner, basis in due.items()
    }
    weighted = {owner for owner, found in grams.items() if normalise == "tensor" and len(found) > 1}
    sizes = {owner: [(over, _trace(gram)) for over, gram in grams[owner]] for owner in grams if owner in weighted}
    all_reduce_((size, over) for found in sizes.values() for over, size in found)
    sums: dict[Owner, dict[Over, Tensor]] = {}
    for owner, found in grams.items():
        into = sums.setdefault(owner, {})
        for index, (over, gram) in enumerate(found):
            gram = _over(gram, sizes[owner][index][1]) if owner in weighted else gram
            into[over] = into[over] + gram if over in into else gram
    _sum_halves_([(gram, over) for found in sums.values() for over, gram in found.items() if over.size > 1])
    result: dict[Owner, Tensor] = {}
    for owner, summands in sums.items():
        first, *rest = summands.values()
        total = sum(rest, first)
        if owner in weighted or normalise == "none":
            result[owner] = torch.where(total.sum().isfinite(), total, 0.0)
        else:
            result[owner] = _over(total, _trace(total))
    return result


def _sum_halves_(grams: list[tuple[Tensor, Over]]) -> None:
    """Sum symmetric matrices over ranks in place; of each only one half is sent, diagonal included."""
    halves = []
    for gram, _ in grams:
        rows, columns = torch.tril_indices(gram.shape[-1], gram.shape[-1], device=gram.device)
        halves.append((gram[:, rows, columns], rows, columns))
    all_reduce_((half, over) for (half, _, _), (_, over) in zip(halves, grams, strict=True))
    for (gram, _), (half, rows, columns) in zip(grams, halves, strict=True):
        gram[:, rows, columns] = half
        gram[:, columns, rows] = half


def _gram(held: Held, place: Owner, side: Side, basis: Due, parts: int) -> tuple[Over, Tensor]:
    """Over whom one side's Gram is to be summed, and this rank's summand, zero where it holds nothing of it."""
    g, i, axis = place
    placing = held.placings.get((g, i))
    if placing is None:
        gradient = held.home[g, i]
        begin, end = part_bounds(gradient.shape[1 - axis], parts, basis.turn)
        view = view_of(gradient, axis, side.heads)[:, :, begin:end]
        return Over(), gram_difference([], [view.to(basis.dtype)])[0]
    spread = placing.at[axis]
    assert spread is not None
    gradient = held.at((g, i), spread)
    begin, end = part_bounds(spread.shape[1 - axis], parts, basis.turn)
    found = gradient.new_zeros((side.heads, side.width, side.width), dtype=basis.dtype)
    own, (first, last) = rows_of(side, spread, axis), spread.mine[1 - axis]
    begin, end = max(first, begin), min(last, end)
    if own.start < own.stop and begin < end:
        view = view_of(gradient, axis, own.stop - own.start)[:, :, begin - first : end - first]
        found[own] = gram_difference([], [view.to(basis.dtype)])[0]
    return Over() if spread.replicated else spread.over, found


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum()


def _over(gram: Tensor, size: Tensor) -> Tensor:
    return torch.where(size.isfinite() & (size > 0), gram / size, 0.0)

