"""Which joints a layout makes impossible, and why; the same answer on every rank."""

from __future__ import annotations

from collections.abc import Mapping
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
        if _is_ragged(layout):
            return (
                f"{lies} with parts of unequal length, for which torch keeps no account of who holds what; choose a "
                f"dimension that the ranks divide (shard_placement_fn of fully_shard)"
            )
        if whole_only and layout.cutting(*range(len(layout.shape))):
            return f"{lies}: {whole_only}; leave the joint out, or take another objective"
    return None


def _is_ragged(layout: Layout) -> bool:
    """Whether a dimension that is cut twice, the later cut first, does not divide evenly."""
    for dim, size in enumerate(layout.shape):
        cutting = layout.cutting(dim)
        assert layout.mesh is not None
        if any(type(layout.placements[m]).__name__ == "_StridedShard" for m in cutting) and size % layout.over(dim).size:
            return True
    return False
