"""Norm proposals: which layers read each norm, and what its gain shares with the layer in front of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from teleport_fast.discovery.candidates import Candidate, Views, norm_candidate
from teleport_fast.discovery.flow import Flow
from teleport_fast.discovery.gains import centres, gain_of, gain_shift, is_norm
from teleport_fast.discovery.roles import Role, join
from teleport_fast.discovery.slots import Slot, slot_of
from teleport_fast.symmetry.diagonal_groups import Permutation, Signs
from teleport_fast.symmetry.groups import Group, Orthogonal
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View


def norm_proposals(model: nn.Module, found: Sequence[Role], views: Views, flow: Flow | None) -> list[Candidate]:
    """A candidate per norm with a gain: its readers as seen in a run, or as its place suggests where none was seen."""
    slots = [slot for role in found for slot in (*role.reads(), *role.writes(), *role.inner())]
    # experts are one module that is fed before its first layer, so its last one reads nothing from outside
    ends = {id(slot) for role in found for slot in role.writes() if slot.tensors is not None}
    claimed = {id(slot.module) for slot in slots}
    others = [slot_of(name, module) for name, module in model.named_modules() if id(module) not in claimed]
    heads = [slot for slot in others if slot is not None]
    proposals: list[Candidate] = []
    for parent_name, parent in model.named_modules():
        norms = [(name, module) for name, module in parent.named_children() if is_norm(module)]
        for index, (child, norm) in enumerate(norms):
            gain, name = gain_of(norm), join(parent_name, child)
            if gain is None or gain.ndim != 1:
                continue
            width = gain.shape[-1]
            if flow is None:
                readers = _likely(parent_name, index, found, [slot for slot in heads if slot.in_features == width])
            else:
                fed = [slot for slot in (*slots, *heads) if flow.feeds(norm, slot.module) and id(slot) not in ends]
                readers = [("seen", [slot for slot in fed if slot.in_features == width])]
            candidate = norm_candidate(name, norm, readers, views, width)
            if candidate is not None:
                proposals.append(candidate)
            if flow is not None:
                writers = [s for s in (*slots, *heads) if flow.feeds(s.module, norm) and s.size == width]
                proposals += _in_front(name, norm, writers[-1:], readers[0][1], views, width, flow)
    return proposals


def _likely(parent: str, index: int, found: Sequence[Role], heads: list[Slot]) -> list[tuple[str, list[Slot]]]:
    """Norms of a block stand before the roles of that block, in order; one elsewhere before layers without a role."""
    inside = [(role.name, role.reads()) for role in found if role.name.startswith(f"{parent}.")] if parent else []
    if not inside:
        return [(slot.layer, [slot]) for slot in heads]
    return inside[index : index + 1] + inside[:index] + inside[index + 1 :]


def _in_front(
    name: str, norm: nn.Module, writers: list[Slot], readers: list[Slot], views: Views, width: int, flow: Flow
) -> Iterator[Candidate]:
    """A layer whose outputs go into this norm: their signs, and between two layers their order, or rotations of them."""
    gain = views.gain(norm, width)
    plus = tuple(view for slot in writers for view in views.rows(slot, 1, width))
    if not plus:
        return
    minus = tuple(dict.fromkeys(view for slot in readers for view in views.columns(slot, 1, width)))
    between = bool(minus) and not flow.spaces_out(norm) & flow.summed()

    def joint(part: str, kind: str, group: Group, plus: tuple[View, ...], minus: tuple[View, ...]) -> Joint:
        return Joint(f"{name}.{part}", kind, group, 1, width, plus, minus)

    weight = gain_of(norm)
    folded = weight is not None and not weight.requires_grad and bool((weight + gain_shift(norm) == 1).all())
    if folded and between:
        turns = [
            joint("latent", "latent", group, plus, minus)
            for group in (Orthogonal(width), Orthogonal(width, fixes_ones=True))
        ]
        yield Candidate(f"{name}.latent", "latent", tuple(turns), "the norm is not rotation-equivariant")
    elif between and gain:
        order = joint("order", "latent-order", Permutation(width), plus + gain, minus)
        yield Candidate(order.name, order.kind, (order,), "something else tells the units apart")
    if gain and not centres(norm):
        signs = joint("signs", "norm-signs", Signs(width), plus, gain[:1])
        yield Candidate(signs.name, signs.kind, (signs,), "the norm is not odd")
