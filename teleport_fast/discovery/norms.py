"""Norm proposals: which layers read each norm, and what its gain shares with the layer in front of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from teleport_fast.discovery.candidates import Candidate, Views, norm_candidate
from teleport_fast.discovery.flow import Flow
from teleport_fast.discovery.gains import gain_of, is_norm
from teleport_fast.discovery.roles import Role, join
from teleport_fast.discovery.slots import Slot, slot_of


def norm_proposals(model: nn.Module, found: Sequence[Role], views: Views, flow: Flow | None) -> list[Candidate]:
    """A candidate per norm with a gain: its readers as seen in a run, or as its place suggests where none was seen."""
    claimed = {id(slot.module) for role in found for slot in (*role.reads(), *role.writes())}
    others = [slot_of(name, module) for name, module in model.named_modules() if id(module) not in claimed]
    heads = [slot for slot in others if slot is not None]
    slots = [slot for role in found for slot in (*role.reads(), *role.writes())] + heads
    proposals = []
    for parent_name, parent in model.named_modules():
        norms = [(name, module) for name, module in parent.named_children() if is_norm(module)]
        for index, (child, norm) in enumerate(norms):
            gain = gain_of(norm)
            if gain is None:
                continue
            width = gain.shape[-1]
            name = join(parent_name, child)
            if flow is not None:
                readers = [("seen", [slot for slot in slots if flow.feeds(norm, slot.module)])]
            else:
                readers = _likely(parent_name, index, found, [slot for slot in heads if slot.in_features == width])
            candidate = norm_candidate(name, norm, readers, views, width)
            if candidate is not None:
                proposals.append(candidate)
    return proposals


def _likely(parent: str, index: int, found: Sequence[Role], heads: list[Slot]) -> list[tuple[str, list[Slot]]]:
    """Norms of a block stand before the roles of that block, in order; one elsewhere before layers without a role."""
    inside = [(role.name, role.reads()) for role in found if role.name.startswith(f"{parent}.")] if parent else []
    if not inside:
        return [(slot.layer, [slot]) for slot in heads]
    return inside[index : index + 1] + inside[:index] + inside[index + 1 :]
