"""Mixtures of experts: each expert an MLP in a 3-D tensor, the experts' order with their rows of the router."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from teleport_fast.discovery.candidates import Candidate, Views, maker
from teleport_fast.discovery.roles import Mlp, Role, builder, count, join
from teleport_fast.discovery.slots import Layer, Slot, matrix
from teleport_fast.symmetry.diagonal_groups import Permutation
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View

_ROUTER = ("gate", "router", "router_layer")
_GROUPS = ("n_group", "n_groups", "num_expert_group")


@builder
def fused_experts(name: str, module: nn.Module) -> Iterator[Mlp]:
    """`gate_up_proj` (n, 2·hidden, d) and `down_proj` (n, d, hidden), or both with the last two axes exchanged."""
    fused, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(fused, nn.Parameter) or not isinstance(down, nn.Parameter) or fused.ndim != 3 or down.ndim != 3:
        return
    for out in (1, 2):
        hidden = down.shape[3 - out]
        if fused.shape[out] == 2 * hidden and fused.shape[3 - out] == down.shape[out]:
            reads = _experts(fused, getattr(module, "gate_up_proj_bias", None), out)
            writes = _experts(down, getattr(module, "down_proj_bias", None), out)
            gate, up = (Slot(name, module, start, hidden, tensors=reads) for start in (0, hidden))
            yield Mlp(name, up, Slot(name, module, 0, down.shape[out], tensors=writes), gate, swapped=True)
            return


def _experts(weight: Tensor, bias: Tensor | None, out: int) -> Layer:
    rows: tuple[tuple[Tensor, int], ...] = ((weight, out),)
    rows += () if bias is None else ((bias, 1),)
    return Layer(rows, ((weight, 3 - out),), weight.shape[3 - out], weight.shape[out], heads=0)


@dataclass(frozen=True)
class Experts(Role):
    """The experts of one layer: every tensor with an axis of them, their router among these."""

    name: str
    router: Slot
    tensors: tuple[Tensor, ...]
    experts: int
    groups: int

    def reads(self) -> list[Slot]:
        return [self.router]

    def writes(self) -> list[Slot]:
        return []


@builder
def mixture(name: str, module: nn.Module) -> Iterator[Experts]:
    """A child `experts` of 3-D tensors beside a router with a row per expert; its buffers of that size move too."""
    inner = getattr(module, "experts", None)
    router = next((r for r in (getattr(module, n, None) for n in _ROUTER) if isinstance(r, nn.Module)), None)
    if not isinstance(inner, nn.Module) or router is None:
        return
    stacked = [p for p in inner.parameters(recurse=False) if p.ndim >= 2]
    weight, bias = getattr(router, "weight", None), getattr(router, "bias", None)
    if not stacked or not isinstance(weight, nn.Parameter) or weight.shape[0] != stacked[0].shape[0]:
        return
    number = weight.shape[0]
    vectors = [t for m in (module, router) for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    moved = [t for t in vectors if t.is_floating_point() and t.ndim and t.shape[0] == number]
    tensors = tuple({id(t): t for t in (*stacked, *moved)}.values())
    child = next(n for n in _ROUTER if getattr(module, n, None) is router)
    slot = Slot(join(name, child), router, 0, number, tensors=matrix(weight, bias))
    groups = max((count(m, _GROUPS) or 1 for m in (module, router)), default=1)
    yield Experts(name, slot, tensors, number, groups if number % groups == 0 else 1)


@maker(Experts)
def experts_candidates(role: Role, views: Views) -> Iterator[Candidate]:
    """The order of all experts; where the router chooses among groups, of those in a group and of the groups."""
    assert isinstance(role, Experts)
    number, groups = role.experts, role.groups
    plain = tuple(replace(views.axis(tensor, 0, number), counts=False) for tensor in role.tensors)
    trained = {views.names[id(tensor)] for tensor in role.tensors if isinstance(tensor, nn.Parameter)}

    def candidate(part: str, heads: int, width: int, moved: tuple[View, ...]) -> Candidate:
        plus = tuple(view for view in moved if view.parameter in trained)
        carried = tuple(view for view in moved if view.parameter not in trained)
        joint = Joint(join(role.name, part), part, Permutation(width), heads, width, plus, (), carried)
        return Candidate(joint.name, part, (joint,), "something else tells the experts apart")

    if groups == 1:
        yield candidate("expert-order", 1, number, plain)
        return
    size = number // groups
    within = tuple(replace(view, heads=groups, width=size, head_stride=size) for view in plain)
    whole = tuple(replace(view, width=groups, width_stride=size, repeats=size, repeat_stride=1) for view in plain)
    if size > 1:
        yield candidate("expert-order", groups, size, within)
    yield candidate("expert-group-order", 1, groups, whole)
