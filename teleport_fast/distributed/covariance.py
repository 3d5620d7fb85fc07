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


class Covariances:
    """What one gradient adds to the covariances of many buckets, from this rank's parts."""

    def __init__(self, gradients: Mapping[str, Tensor], over: Over, local_of: LocalOf, counts: Callable[[Layout], bool]) -> None:
        self._gradients, self._over, self._local_of, self._counts = gradients, over, local_of, counts

    def observe_(self, objective: Eigenbasis, serving: Sequence[tuple[int, Bucket, list[Run]]]) -> None:
        """C ← β C + (1 − β) Σ G Gᵀ/‖G‖² for every bucket: one sum over ranks for all ‖G‖², one for all Σ G Gᵀ/‖G‖².

        Source: math.md section 5; tests/distributed/checks_fsdp.py holds it to what one process has.
        """
        chosen = [self._chosen(runs, objective.next_part(index), objective.parts) for index, _, runs in serving]
        sizes = self._sizes(serving, chosen)
        totals = []
        for (_, bucket, runs), size, columns in zip(serving, sizes, chosen, strict=True):
            if objective.normalise == "joint":
                size = size.sum(0, keepdim=True).expand_as(size)
            usable = size.isfinite() & (size > 0)
            weights = torch.where(usable, torch.ones_like(size) if objective.normalise == "none" else size.reciprocal(), 0.0)
            first = self._part(bucket.parameters()[0])
            total = zeros(bucket, 2, first.dtype, first.device)
            for run, weight in zip(runs, weights, strict=True):
                self._add_(total, run, weight, bucket, columns)
            totals.append(total)
        all_reduce_([(total, self._over) for total in totals])
        for (index, _, _), total in zip(serving, totals, strict=True):
            objective.take_in(index, total)

    def _part(self, name: str) -> Tensor:
        return local_part(self._gradients[name])

    def _chosen(self, runs: Sequence[Run], part: int, parts: int) -> dict[str, Taken | None]:
        """Which columns each view gives, by the view's parameter and what it shows of it."""
        if parts == 1:
            return {}
        joints = [(joint, joint.plus[0]) for run in runs for joint in run.views.joints]
        return {joint.name + str(view): taken(view, self._gradients[view.parameter], part, parts) for joint, view in joints}

    def _views(
        self, part: Part, run: Run, tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout], columns: Mapping[str, Taken | None]
    ) -> list[Tensor]:
        """The part's views with the columns that are taken; every joint has as many."""
        found = []
        for place, joint in zip(part.joints, part.bucket.joints, strict=True):
            whole = run.views.joints[place]
            choice = columns.get(whole.name + str(whole.plus[0]))
            for view in joint.plus:
                alias = view.of(tensors[view.parameter])
                found.append(alias if choice is None else choice.of(alias, tensors[view.parameter], layouts[view.parameter]))
        return found

    def _layouts(self, bucket: Bucket) -> dict[str, Layout]:
        return {name: layout_of(self._gradients[name]) for name in bucket.parameters()}

    def _sizes(
        self, serving: Sequence[tuple[int, Bucket, list[Run]]], chosen: Sequence[Mapping[str, Taken | None]]
    ) -> list[Tensor]:
        """‖G‖² of every view over all ranks, for each bucket (views, joints) float64; 0 for joints without that view."""
        places: dict[torch.dtype, list[int]] = {}
        views: dict[torch.dtype, list[Tensor]] = {}
        first, shapes = 0, []
        for (_, bucket, runs), columns in zip(serving, chosen, strict=True):
            for run in runs:
                layouts = self._layouts(run.rows)
                for part in self._local_of(run.rows, layouts, self._counts).parts:
                    here = {name: self._part(name) for name in part.bucket.parameters()}
                    shown = self._views(part, run, here, layouts, columns)
                    for i, view in enumerate(shown):
                        place = run.places[part.joints[i * len(part.joints) // len(shown)]]
                        places.setdefault(view.dtype, []).append(first + place)
                        views.setdefault(view.dtype, []).append(view)
                first += len(bucket.joints)
            shapes.append((len(runs), len(bucket.joints)))
        device = self._part(serving[0][1].parameters()[0]).device
        found = torch.zeros(first, dtype=torch.float64, device=device)
        for dtype, alike in views.items():  # one call: a kernel for each of hundreds of matrices would be most of the cost
            norms = torch.stack(torch._foreach_norm(alike, 2, torch.promote_types(dtype, torch.float32)))
            found.index_add_(0, torch.tensor(places[dtype], device=device), norms.double().square().to(device))
        all_reduce_([(found, self._over)])
        return [part.view(shape) for part, shape in zip(found.split([a * b for a, b in shapes]), shapes, strict=True)]

    def _add_(self, total: Tensor, run: Run, weight: Tensor, whole: Bucket, columns: Mapping[str, Taken | None]) -> None:
        """Add G Gᵀ times the joint's weight for one view of every joint, one turned tensor at a time."""
        layouts = self._layouts(run.views)
        local = self._local_of(run.views, layouts, self._counts)
        work: list[tuple[Part, dict[str, Tensor]]] = [
            (part, {name: self._part(name) for name in part.bucket.parameters()}) for part in local.parts
        ]
        for part, tensors in work:
            self._add_part_(total, run, part, self._views(part, run, tensors, layouts, columns), weight, whole)
        for turn in local.turns:
            turned = local_part(laid_out(self._gradients[turn.parameter], turn.placements))
            lies = {turn.parameter: replace(layouts[turn.parameter], placements=turn.placements)}
            for part in turn.parts:
                views = self._views(part, run, {turn.parameter: turned}, lies, columns)
                self._add_part_(total, run, part, views, weight, whole)

    @staticmethod
    def _add_part_(total: Tensor, run: Run, part: Part, views: Sequence[Tensor], weight: Tensor, whole: Bucket) -> None:
        wide = [view.to(total.dtype) for view in views]
        gram = gram_difference([], wide, len(part.joints))[0]
        where = [run.places[joint] for joint in part.joints]
        factor = weight[where].to(gram.dtype).repeat_interleave(part.bucket.heads)[:, None, None]
        replace(part, joints=tuple(where)).add_(total, torch.where(factor != 0, gram * factor, 0.0), whole)
