"""The running gradient covariance of `Eigenbasis` from many ranks' parts: two all-reduces for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teleport_fast.distributed.columns import Taken, taken
from teleport_fast.distributed.layout import Layout, Over, layout_of, local_part
from teleport_fast.distributed.parts import Local, Part, zeros
from teleport_fast.distributed.reduce import all_reduce_
from teleport_fast.distributed.turn import laid_out
from teleport_fast.objectives.eigenbasis import Eigenbasis
from teleport_fast.ops.gram_difference import gram_difference
from teleport_fast.symmetry.bucket import Bucket
from teleport_fast.symmetry.diagonal_groups import Diagonal

LocalOf = Callable[[Bucket, Mapping[str, Layout], Callable[[Layout], bool]], Local]


@dataclass(frozen=True)
class Run:
    """One counted view of every joint that has so many: the joints' places, the views, and the same as rows of a diagonal.

    A size needs no whole heads: as rows of a diagonal joint nothing has to be laid out anew for it.
    """

    places: tuple[int, ...]
    views: Bucket
    rows: Bucket


def runs_of(bucket: Bucket) -> list[Run]:
    """A bucket's matrices that count, the first of every joint, the second of every joint, …"""
    counted = [[view for view in joint.views() if view.counts] for joint in bucket.joints]
    runs = []
    for k in range(max(map(len, counted))):
        places = tuple(i for i, views in enumerate(counted) if k < len(views))
        joints = tuple(replace(bucket.joints[i], plus=(counted[i][k],), minus=(), carried=()) for i in places)
        rows = tuple(replace(joint, group=Diagonal(joint.width)) for joint in joints)
        runs.append(Run(places, Bucket(joints), Bucket(rows)))
    return runs


@dataclass(frozen=True)
class Lie:
    """Where a run's gradients lie, what this rank holds of them, and of their rows; looked up once, as parameters are."""

    layouts: dict[str, Layout]
    local: Local
    rows: Local


class Covariances:
    """What a gradient adds to the covariances of many buckets, from this rank's parts."""

    def __init__(self, over: Over, local_of: LocalOf, counts: Callable[[Layout], bool]) -> None:
        self._over, self._local_of, self._counts = over, local_of, counts
        # by the bucket's id, and with the bucket, so that no other one takes its id
        self._runs: dict[int, tuple[Bucket, list[Run]]] = {}
        self._lies: dict[int, Lie] = {}
        self._taken: dict[tuple[int, int, int], list[Taken | None]] = {}

    def observe_(
        self, objective: Eigenbasis, serving: Sequence[tuple[int, Bucket]], gradients: Mapping[str, Tensor]
    ) -> None:
        """C ← β C + (1 − β) Σ G Gᵀ/‖G‖² for every bucket: one sum over ranks for all ‖G‖², one for all Σ G Gᵀ/‖G‖².

        gradients: laid out as their parameters are. Source: docs/mathematics.md; tests/distributed/checks_fsdp.py holds it to what
        one process has.
        """
        if not serving:
            return
        work = [(index, bucket, self._runs_of(bucket), objective.next_part(index)) for index, bucket in serving]
        sizes = self._sizes(work, objective.parts, gradients)
        totals = []
        for (_, bucket, runs, part), size in zip(work, sizes, strict=True):
            if objective.normalise == "joint":
                size = size.sum(0, keepdim=True).expand_as(size)
            usable = size.isfinite() & (size > 0)
            weights = torch.where(usable, torch.ones_like(size) if objective.normalise == "none" else size.reciprocal(), 0.0)
            first = local_part(gradients[bucket.joints[0].parameters()[0]])
            total = zeros(bucket, 2, first.dtype, first.device)
            for run, weight in zip(runs, weights.to(total.dtype), strict=True):
                self._add_(total, run, weight, bucket, self._columns(run, gradients, part, objective.parts), gradients)
            totals.append(total)
        all_reduce_([(total, self._over) for total in totals])
        for (index, *_), total in zip(work, totals, strict=True):
            objective.take_in(index, total)

    def _runs_of(self, bucket: Bucket) -> list[Run]:
        if id(bucket) not in self._runs:
            self._runs[id(bucket)] = bucket, runs_of(bucket)
        return self._runs[id(bucket)][1]

    def _lie(self, run: Run, gradients: Mapping[str, Tensor]) -> Lie:
        if id(run) not in self._lies:
            layouts = {name: layout_of(gradients[name]) for name in run.views.parameters()}
            local, rows = (self._local_of(bucket, layouts, self._counts) for bucket in (run.views, run.rows))
            self._lies[id(run)] = Lie(layouts, local, rows)
        return self._lies[id(run)]

    def _columns(self, run: Run, gradients: Mapping[str, Tensor], part: int, parts: int) -> list[Taken | None]:
        """Which columns each joint's view gives."""
        key = (id(run), part, parts)
        if key not in self._taken:
            views = [joint.plus[0] for joint in run.views.joints]
            self._taken[key] = [None if parts == 1 else taken(v, gradients[v.parameter], part, parts) for v in views]
        return self._taken[key]

    def _sizes(
        self, work: Sequence[tuple[int, Bucket, list[Run], int]], parts: int, gradients: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """‖G‖² of every view over all ranks, for each bucket (views, joints) float64; 0 for joints without that view."""
        places: dict[torch.dtype, list[int]] = {}
        views: dict[torch.dtype, list[Tensor]] = {}
        first, shapes = 0, []
        for _, bucket, runs, number in work:
            for run in runs:
                lie, columns = self._lie(run, gradients), self._columns(run, gradients, number, parts)
                for part in lie.rows.parts:
                    shown = _views(part, columns, gradients, lie.layouts)
                    for i, view in enumerate(shown):
                        place = run.places[part.joints[i * len(part.joints) // len(shown)]]
                        places.setdefault(view.dtype, []).append(first + place)
                        views.setdefault(view.dtype, []).append(view)
                first += len(bucket.joints)
            shapes.append((len(runs), len(bucket.joints)))
        device = local_part(gradients[work[0][1].joints[0].parameters()[0]]).device
        found = torch.zeros(first, dtype=torch.float64, device=device)
        for dtype, alike in views.items():  # one call: a kernel for each of hundreds of matrices would be most of the cost
            norms = torch.stack(torch._foreach_norm(alike, 2, torch.promote_types(dtype, torch.float32)))
            found.index_add_(0, torch.tensor(places[dtype], device=device), norms.double().square().to(device))
        all_reduce_([(found, self._over)])
        return [part.view(shape) for part, shape in zip(found.split([a * b for a, b in shapes]), shapes, strict=True)]

    def _add_(
        self,
        total: Tensor,
        run: Run,
        weight: Tensor,
        whole: Bucket,
        columns: Sequence[Taken | None],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Add G Gᵀ times the joint's weight for one view of every joint, one turned tensor at a time."""
        lie = self._lie(run, gradients)
        for part in lie.local.parts:
            _add_part_(total, run, part, _views(part, columns, gradients, lie.layouts), weight, whole)
        for turn in lie.local.turns:
            turned = {turn.parameter: laid_out(gradients[turn.parameter], turn.placements)}
            lies = {turn.parameter: replace(lie.layouts[turn.parameter], placements=turn.placements)}
            for part in turn.parts:
                _add_part_(total, run, part, _views(part, columns, turned, lies), weight, whole)


def _views(
    part: Part, columns: Sequence[Taken | None], tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]
) -> list[Tensor]:
    """The part's views with the columns that are taken; every joint has as many."""
    found = []
    for place, joint in zip(part.joints, part.bucket.joints, strict=True):
        choice = columns[place]
        for view in joint.plus:
            local = local_part(tensors[view.parameter])
            found.append(view.of(local) if choice is None else choice.of(view.of(local), local, layouts[view.parameter]))
    return found


def _add_part_(total: Tensor, run: Run, part: Part, views: Sequence[Tensor], weight: Tensor, whole: Bucket) -> None:
    wide = [view.to(total.dtype) for view in views]
    gram = gram_difference([], wide, len(part.joints))[0]
    where = [run.places[joint] for joint in part.joints]
    factor = weight[where].repeat_interleave(part.bucket.heads)[:, None, None]
    # a gradient that is zero or not finite has no weight, and adds nothing
    replace(part, joints=tuple(where)).add_(total, torch.where(factor != 0, gram * factor, 0.0), whole)
