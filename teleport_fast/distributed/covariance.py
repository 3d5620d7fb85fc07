"""The running gradient covariance of `Eigenbasis` from many ranks' parts: two all-reduces for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from teleport_fast.distributed.layout import Layout, Over, layout_of, local_part
from teleport_fast.distributed.parts import Local, zeros
from teleport_fast.distributed.reduce import all_reduce_
from teleport_fast.distributed.turn import laid_out
from teleport_fast.objectives.eigenbasis import Eigenbasis
from teleport_fast.ops.gram_difference import gram_difference
from teleport_fast.symmetry.bucket import Bucket
from teleport_fast.symmetry.diagonal_groups import Diagonal


class Views:
    """A bucket's matrices that count, as buckets of one view a joint: the first ones, the second ones, …"""

    def __init__(self, bucket: Bucket) -> None:
        counted = [[view for view in joint.views() if view.counts] for joint in bucket.joints]
        self.runs: list[tuple[list[int], Bucket, Bucket]] = []
        for k in range(max(map(len, counted))):
            places = [i for i, views in enumerate(counted) if k < len(views)]
            joints = tuple(replace(bucket.joints[i], plus=(counted[i][k],), minus=(), carried=()) for i in places)
            # the sizes need no whole heads: as rows of a diagonal joint nothing has to be laid out anew
            rows = tuple(replace(joint, group=Diagonal(joint.width)) for joint in joints)
            self.runs.append((places, Bucket(joints), Bucket(rows)))


LocalOf = Callable[[Bucket, Mapping[str, Layout], Callable[[Layout], bool]], Local]


def observe_(
    objective: Eigenbasis,
    serving: Sequence[tuple[int, Bucket, Views]],
    gradients: Mapping[str, Tensor],
    over: Over,
    local_of: LocalOf,
) -> None:
    """C ← β C + (1 − β) Σ G Gᵀ/‖G‖² for every bucket: first all ‖G‖² in one sum over ranks, then all Σ G Gᵀ/‖G‖² in another.

    Source: math.md section 5; tests/distributed/checks_eigenbasis.py holds it to one process' covariances.
    """

    def counts(layout: Layout) -> bool:
        return layout.counts(over.mesh)

    sizes = [[_sizes(run[0], run[2], bucket, gradients, local_of, counts) for run in views.runs] for _, bucket, views in serving]
    all_reduce_([(size, over) for of_bucket in sizes for size in of_bucket])
    totals = []
    for (_, bucket, views), of_bucket in zip(serving, sizes, strict=True):
        size = torch.stack(of_bucket)  # (views, joints)
        if objective.normalise == "joint":
            size = size.sum(0, keepdim=True).expand_as(size)
        usable = size.isfinite() & (size > 0)
        weights = torch.where(usable, 1.0 if objective.normalise == "none" else size.reciprocal(), 0.0)
        first = local_part(gradients[bucket.parameters()[0]])
        total = zeros(bucket, 2, first.dtype, first.device)
        for (places, run, _), weight in zip(views.runs, weights, strict=True):
            _add_(total, places, run, weight, bucket, gradients, local_of, counts)
        totals.append(total)
    all_reduce_([(total, over) for total in totals])
    for (index, _, _), total in zip(serving, totals, strict=True):
        objective.take_in(index, total)


def _sizes(
    places: list[int],
    rows: Bucket,
    whole: Bucket,
    gradients: Mapping[str, Tensor],
    local_of: LocalOf,
    counts: Callable[[Layout], bool],
) -> Tensor:
    """‖G‖² of one view of every joint, (joints,), from what this rank holds; 0 for joints without that view."""
    names = rows.parameters()
    first = local_part(gradients[names[0]])
    found = torch.zeros(len(whole.joints), dtype=torch.float64, device=first.device)
    for part in local_of(rows, {name: layout_of(gradients[name]) for name in names}, counts).parts:
        here = {name: local_part(gradients[name]) for name in part.bucket.parameters()}
        views = part.bucket.plus(here)
        for i, view in enumerate(views):
            joint = part.joints[i * len(part.joints) // len(views)]
            found[places[joint]] += torch.linalg.vector_norm(view, dtype=torch.promote_types(view.dtype, torch.float32)).double().square()
    return found


def _add_(
    total: Tensor,
    places: list[int],
    run: Bucket,
    weight: Tensor,
    whole: Bucket,
    gradients: Mapping[str, Tensor],
    local_of: LocalOf,
    counts: Callable[[Layout], bool],
) -> None:
    """Add G Gᵀ times the joint's weight for one view of every joint."""
    names = run.parameters()
    local = local_of(run, {name: layout_of(gradients[name]) for name in names}, counts)
    work = [(part, {name: gradients[name] for name in part.bucket.parameters()}) for part in local.parts]
    for part, tensors in work:
        _add_part_(total, places, part, {name: local_part(t) for name, t in tensors.items()}, weight, whole)
    for turn in local.turns:
        turned = local_part(laid_out(gradients[turn.parameter], turn.placements))
        for part in turn.parts:
            _add_part_(total, places, part, {turn.parameter: turned}, weight, whole)


def _add_part_(total: Tensor, places: list[int], part, tensors, weight: Tensor, whole: Bucket) -> None:  # type: ignore[no-untyped-def]
    views = [view.to(torch.promote_types(view.dtype, torch.float32)) for view in part.bucket.plus(tensors)]
    gram = gram_difference([], views, len(part.joints))[0]
    where = [places[joint] for joint in part.joints]
    factor = weight[where].to(gram.dtype).repeat_interleave(part.bucket.heads)[:, None, None]
    gram = torch.where(factor != 0, gram * factor, 0.0)
    replace(part, joints=tuple(where)).add_(total, gram, whole)
