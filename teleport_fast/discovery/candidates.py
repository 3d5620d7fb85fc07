"""Candidates: the joints that a role may have, the most general group first; the probe picks the first that holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from teleport_fast.discovery.roles import Attention, Mlp, Slot
from teleport_fast.symmetry.diagonal_groups import Diagonal, Permutation, PositiveDiagonal
from teleport_fast.symmetry.groups import GeneralLinear, Group, Rotary
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View


@dataclass(frozen=True)
class Candidate:
    """One hidden space and the joints it may be, most general first; `otherwise` explains it when none holds.

    `wider` is tried after the first alternative has passed: it contains that group and is dear to prove.
    """

    name: str
    kind: str
    alternatives: tuple[Joint, ...]
    otherwise: str
    wider: Joint | None = None


class Views:
    """Makes views under the names that the model's parameters have; a slot's rows, its bias, or its columns."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names

    def rows(
        self, slot: Slot, heads: int, width: int, repeats: int = 1, power: float = 1.0, counts: bool = True
    ) -> tuple[View, ...]:
        weight = View(
            self.names[id(slot.module.weight)],
            0,
            heads,
            width,
            slot.start,
            repeats=repeats,
            power=power,
            counts=counts,
        )
        if slot.bias is None:
            return (weight,)
        return weight, replace(weight, parameter=self.names[id(slot.bias)], counts=False)

    def columns(self, slot: Slot, heads: int, width: int, repeats: int = 1, power: float = 1.0) -> tuple[View, ...]:
        """Columns of the slot's layer; a fused layer is read whole, so its slots share one view."""
        return (View(self.names[id(slot.module.weight)], 1, heads, width, repeats=repeats, power=power),)

    def axis(self, parameter: Tensor, axis: int, width: int, counts: bool = False) -> View:
        return View(self.names[id(parameter)], axis, 1, width, counts=counts)


def attention_candidates(role: Attention, views: Views) -> Iterator[Candidate]:
    """V–O: GL(d_head) per key/value head. Q–K: GL, else what commutes with a rotary embedding."""
    heads, width, repeats = role.kv_heads, role.head_dim, role.heads // role.kv_heads
    name = f"{role.name}.value-output"
    plus = views.rows(role.value, heads, width)
    minus = views.columns(role.output, heads, width, repeats)
    yield Candidate(
        name,
        "value-output",
        (Joint(name, "value-output", GeneralLinear(width), heads, width, plus, minus),),
        "something acts between value and output (a norm, an activation, or dropout)",
    )
    name = f"{role.name}.query-key"
    plus, minus = views.rows(role.query, heads, width, repeats), views.rows(role.key, heads, width)
    groups: list[tuple[str, Group]] = [("query-key", GeneralLinear(width))]
    if width % 2 == 0:
        groups += [("query-key-rotary", Rotary(width, rotary=width, layout=x)) for x in ("half", "interleaved")]
    yield Candidate(
        name,
        "query-key",
        tuple(Joint(name, kind, group, heads, width, plus, minus) for kind, group in groups),
        "queries and keys pass through a norm or an unknown position encoding",
    )


def mlp_candidates(role: Mlp, views: Views) -> Iterator[Candidate]:
    """Up–down: any diagonal (GL without an activation), a positive one, degree 2; and the neurons' permutation."""
    width = role.up.size
    name = f"{role.name}.up-down"
    plus, minus = views.rows(role.up, 1, width), views.columns(role.down, 1, width)
    squared = views.columns(role.down, 1, width, power=2.0)
    alternatives = [
        Joint(name, "up-down", group, 1, width, plus, minus) for group in (Diagonal(width), PositiveDiagonal(width))
    ]
    alternatives.append(Joint(name, "up-down-squared", PositiveDiagonal(width), 1, width, plus, squared))
    wider = Joint(name, "up-down", GeneralLinear(width), 1, width, plus, minus)
    if role.gate is not None:
        alternatives = alternatives[:1]
    yield Candidate(
        name,
        "up-down",
        tuple(alternatives),
        "the activation is not homogeneous: no scaling leaves the function",
        wider if role.gate is None else None,
    )
    gate = views.rows(role.gate, 1, width) if role.gate is not None else ()
    name = f"{role.name}.neurons"
    if width > 1:
        joint = Joint(name, "neurons", Permutation(width), 1, width, (*plus, *gate), minus)
        yield Candidate(name, "neurons", (joint,), "units are not interchangeable between up and down")


def norm_candidate(
    name: str, norm: nn.Module, readers: list[tuple[str, list[Slot]]], views: Views, width: int
) -> Candidate | None:
    """Norm gain (and bias) → the linear layers that read it; the likeliest reader first."""
    gain = getattr(norm, "weight", None)
    if not isinstance(gain, nn.Parameter) or not gain.requires_grad or tuple(gain.shape) != (width,):
        return None
    plus = [views.axis(gain, 0, width)]
    bias = getattr(norm, "bias", None)
    if isinstance(bias, nn.Parameter):
        plus.append(views.axis(bias, 0, width))
    alternatives = []
    for _, slots in readers:
        minus = tuple(dict.fromkeys(view for slot in slots for view in views.columns(slot, 1, width)))
        if minus and all(slot.module.in_features == width for slot in slots):
            alternatives.append(Joint(f"{name}.readers", "norm-readers", Diagonal(width), 1, width, tuple(plus), minus))
    reason = "no set of linear layers reads this norm alone (a tied head keeps its gain)"
    return Candidate(f"{name}.readers", "norm-readers", tuple(alternatives), reason)
