"""Which joints a layout makes impossible, and why; the same answer on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING

from torch import Tensor

from teleport_fast.distributed.layout import Layout, layout_of
from teleport_fast.objectives import Objective
from teleport_fast.symmetry.joint import Joint

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def impossible(objective: Objective, joint: Joint, parameters: Mapping[str, Tensor], widest: DeviceMesh) -> str | None:
    """Why a joint of these parameters cannot be teleported where they lie, or None."""
    everyone = set(widest.mesh.flatten().tolist())
    whole_only = objective.needs_whole(joint)
    for name, parameter in parameters.items():
        try:
            layout = layout_of(parameter)
        except ValueError as error:
            return f"{name!r}: {error}"
        if layout.mesh is None:
            continue
        lies = f"{name!r} lies as {', '.join(map(str, layout.placements))}"
        if not everyone.issuperset(layout.mesh.mesh.flatten().tolist()) or layout.mesh.get_coordinate() is None:
            return (
                f"{lies} on ranks {layout.mesh.mesh.tolist()}, which are not part of those of the widest mesh, "
                f"{widest.mesh.tolist()}; put the joint's parameters on one mesh, or on slices of one"
            )
        if is_ragged(layout):
            return (
                f"{lies} with parts of unequal length, for which torch keeps no account of who holds what; choose a "
                f"dimension that the ranks divide (shard_placement_fn of fully_shard)"
            )
        if whole_only and layout.cutting(*range(len(layout.shape))):
            return f"{lies}: {whole_only}; leave the joint out, or take another objective"
    return None


def is_ragged(layout: Layout) -> bool:
    """Whether placements of a dimension that is cut twice say another thing than what its ranks hold.

    fully_shard cuts what tensor parallelism has cut before, so right to left; _StridedShard tells it left to right, which is the
    same only where the parts come out alike.
    """
    for dim, size in enumerate(layout.shape):
        strided = [m for m in layout.cutting(dim) if type(layout.placements[m]).__name__ == "_StridedShard"]
        if not strided or layout.mesh is None:
            continue
        plain = [m for m in layout.cutting(dim) if m not in strided]
        for place in product(*(range(layout.mesh.size(m)) for m in (*plain, *strided))):
            at = dict(zip((*plain, *strided), place, strict=True))
            begin, end = 0, size
            for m in (*plain, *reversed(strided)):
                step = -(-(end - begin) // layout.mesh.size(m))
                begin, end = min(begin + at[m] * step, end), min(begin + (at[m] + 1) * step, end)
            told = layout.runs_at(tuple(at.get(m, 0) for m in range(len(layout.placements))))[dim]
            if sum(run.stop - run.start for run in told) != end - begin or (told and (told[0].start, told[-1].stop) != (begin, end)):
                return True
    return False
