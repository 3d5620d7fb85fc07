"""Candidates: the joints that a role may have, the most general group first; the probe picks the first that holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from teleport_fast.discovery.gains import centres, gain_of, gain_shift
from teleport_fast.discovery.roles import Attention, Mlp, Role, join
from teleport_fast.discovery.slots import Slot
from teleport_fast.symmetry.diagonal_groups import Diagonal, Permutation, PositiveDiagonal, Signs
from teleport_fast.symmetry.groups import GeneralLinear, Group, Rotary
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View


@dataclass(frozen=True)
class Candidate:
    """One hidden space and the joints it may be, most general first; `otherwise` explains it when none holds.

    `wider` is tried after the first alternative has passed: it contains that group and is dear to prove. `fallback`
    holds smaller symmetries of the same space, tried when no alternative holds. `known`: the operators between writers and
    readers were seen, so that the first alternative may be trusted without a proof.
    """

    name: str
    kind: str
    alternatives: tuple[Joint, ...]
    otherwise: str
    wider: Joint | None = None
    fallback: tuple[Candidate, ...] = ()
    known: bool = False


class Views:
    """Makes views under the names that the model's parameters have; a slot's rows, its bias, or its columns."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names

    def rows(
        self, slot: Slot, heads: int, width: int, repeats: int = 1, power: float = 1.0, counts: bool = True
    ) -> tuple[View, ...]:
        """The slot's outputs as heads of width units, `repeats` heads sharing each; weight first, then bias."""
        layer = slot.parts
        stride = slot.head_stride or -1
        return tuple(
            View(
                self.names[id(tensor)],
                axis,
                heads,
                width,
                slot.start,
                stride,
                repeats=repeats,
                power=power,
                counts=counts and tensor.ndim > 1,
                head_axis=layer.heads if heads > 1 else None,
            )
            for tensor, axis in layer.rows
        )

    def columns(
        self, slot: Slot, heads: int, width: int, repeats: int = 1, power: float = 1.0, start: int = 0
    ) -> tuple[View, ...]:
        """Columns of the slot's layer; a fused layer is read whole, so its slots share one view."""
        layer = slot.parts
        return tuple(
            View(
                self.names[id(tensor)], axis, heads, width, start, repeats=repeats, power=power,
                head_axis=layer.heads if heads > 1 else None,
            )
            for tensor, axis in layer.columns
        )  # fmt: skip

    def heads(self, slot: Slot, groups: int, width: int, size: int, stride: int = 0) -> tuple[View, ...]:
        """Rows as units of `size` rows each: what a permutation of heads moves; `groups` of `width` heads."""
        step = stride or size
        return tuple(
            View(
                self.names[id(tensor)], axis, groups, width, slot.start, step * width, step, size, 1,
                counts=tensor.ndim > 1,
            )
            for tensor, axis in slot.parts.rows
        )  # fmt: skip

    def head_columns(self, slot: Slot, groups: int, width: int, size: int) -> tuple[View, ...]:
        """Columns as units of `size` columns each."""
        return tuple(
            View(self.names[id(tensor)], axis, groups, width, 0, size * width, size, size, 1)
            for tensor, axis in slot.parts.columns
        )

    def axis(self, parameter: Tensor, axis: int, width: int, counts: bool = False) -> View:
        return View(self.names[id(parameter)], axis, 1, width, counts=counts)

    def gain(self, norm: nn.Module, width: int) -> tuple[View, ...]:
        """The gain of a norm, shifted where it is stored as 1 + w, and its bias; empty where it has none that trains."""
        gain, bias = gain_of(norm), getattr(norm, "bias", None)
        if gain is None or not gain.requires_grad or tuple(gain.shape) != (width,):
            return ()
        found = [replace(self.axis(gain, 0, width), shift=gain_shift(norm))]
        if isinstance(bias, nn.Parameter):
            found.append(self.axis(bias, 0, width))
        return tuple(found)


Maker = Callable[[Role, Views], Iterator[Candidate]]
_MAKERS: dict[type[Role], Maker] = {}


def maker(role: type[Role]) -> Callable[[Maker], Maker]:
    """Register which candidates a kind of role has."""

    def register(function: Maker) -> Maker:
        _MAKERS[role] = function
        return function

    return register


def candidates(role: Role, views: Views) -> Iterator[Candidate]:
    return _MAKERS[type(role)](role, views)


@maker(Attention)
def attention_candidates(role: Role, views: Views) -> Iterator[Candidate]:
    """V–O: GL(d_head) per key/value head. Q–K: GL, else what commutes with a rotary embedding. Then orders of heads."""
    assert isinstance(role, Attention)
    yield _value_output(role, views)
    yield _query_key(role, views)
    yield from normed_heads(role, views)
    yield from _head_orders(role, views)


def _value_output(role: Attention, views: Views) -> Candidate:
    heads, width, repeats = role.kv_heads, role.head_dim, role.heads // role.kv_heads
    name = join(role.name, "value-output")
    minus = views.columns(role.output, heads, width, repeats)
    joints = [
        Joint(name, "value-output", GeneralLinear(width), heads, width, views.rows(value, heads, width), minus)
        for _, _, value in role.layouts()
    ]
    reason = "something acts between value and output (a norm, an activation, or dropout)"
    return Candidate(name, "value-output", tuple(joints), reason)


def _query_key(role: Attention, views: Views) -> Candidate:
    heads, width, repeats = role.kv_heads, role.head_dim, role.heads // role.kv_heads
    name = join(role.name, "query-key")
    if role.norms:
        normed = " and ".join(child.rpartition(".")[2] for child, _ in role.norms)
        return Candidate(name, "query-key", (), f"queries and keys pass through a norm ({normed}) before they meet")
    groups: list[tuple[str, Group]] = [("query-key", GeneralLinear(width))]
    for rotary in (*role.rotary, width):  # the fewer are rotated, the larger the group
        if rotary % 2 == 0:
            groups += [("query-key-rotary", Rotary(width, rotary=rotary, layout=x)) for x in ("half", "interleaved")]
    joints = []
    for kind, group in groups:
        for query, key, _ in role.layouts():
            plus, minus = views.rows(query, heads, width, repeats), views.rows(key, heads, width)
            joints.append(Joint(name, kind, group, heads, width, plus, minus))
    reason = "queries and keys pass through a norm or an unknown position encoding"
    return Candidate(name, "query-key", tuple(joints), reason)


def normed_heads(role: Attention, views: Views) -> Iterator[Candidate]:
    """What a norm on queries and keys leaves: its gains' scales plane by plane, and signs."""
    if len(role.norms) < 2 or not role.norms:
        return
    width, (q, k) = role.head_dim, (views.gain(norm, role.head_dim) for _, norm in role.norms)
    if not q or not k:
        return
    name = join(role.name, "query-key-gains")
    joints = [
        Joint(name, "query-key-gains", Diagonal(size), 1, size, plus, minus)
        for size, (plus, minus) in _by_plane(width, q, k)
    ]
    yield Candidate(name, "query-key-gains", tuple(joints), "gains of queries and keys do not meet plane by plane")
    heads, group = role.kv_heads, role.heads // role.kv_heads
    query, key, _ = role.layouts()[0]
    name = join(role.name, "query-key-signs")
    rows = [
        replace(view, repeats=1, start=view.start + g * width)
        for view in views.rows(query, heads, width, group)
        for g in range(group)
    ]
    joints = [
        Joint(name, "query-key-signs", Signs(size), heads, size, plus, minus)
        for size, (plus, minus) in _by_plane(width, tuple(rows), views.rows(key, heads, width))
    ]
    yield Candidate(name, "query-key-signs", tuple(joints), "queries and keys do not meet plane by plane")
    for (norm_name, norm), gain, slot, count in zip(role.norms, (q, k), (query, key), (role.heads, heads), strict=True):
        if not centres(norm) and len(gain) == 1:
            name = f"{norm_name}.signs"
            plus = tuple(replace(view, counts=False) for view in _shared_rows(slot, views, width, count))
            joint = Joint(name, "norm-signs", Signs(width), 1, width, plus, gain)
            yield Candidate(name, "norm-signs", (joint,), "the norm is not odd")


def _shared_rows(slot: Slot, views: Views, width: int, heads: int) -> tuple[View, ...]:
    """Rows of all heads as one space."""
    return tuple(replace(v, repeats=heads, repeat_stride=width) for v in views.rows(slot, 1, width))


def _by_plane(width: int, *sides: tuple[View, ...]) -> Iterator[tuple[int, list[tuple[View, ...]]]]:
    """The sides unit by unit, then with the two units of a rotary plane as one, in either layout."""
    yield width, list(sides)
    if width % 2 == 0:
        for first, step, pair in ((width // 2, 1, width // 2), (width // 2, 2, 1)):
            yield (
                first,
                [
                    tuple(
                        replace(view, width=first, width_stride=step, repeats=2, repeat_stride=pair,
                                head_stride=view.head_stride)
                        for view in side
                    )
                    for side in sides
                ],
            )  # fmt: skip


def _head_orders(role: Attention, views: Views) -> Iterator[Candidate]:
    """Permutations of key/value heads with the queries that they serve, and of the query heads that share one."""
    kv_heads, group, width = role.kv_heads, role.heads // role.kv_heads, role.head_dim
    reason = "heads are told apart by something else (a position bias or a gain of their own)"
    if kv_heads > 1:
        name = join(role.name, "heads")
        minus = views.head_columns(role.output, 1, kv_heads, group * width)
        joints = []
        for query, key, value in role.layouts():
            plus = views.heads(query, 1, kv_heads, group * width, query.head_stride)
            for slot in (key, value):
                plus += views.heads(slot, 1, kv_heads, width, slot.head_stride)
            joints.append(Joint(name, "heads", Permutation(kv_heads), 1, kv_heads, plus, minus))
        yield Candidate(name, "heads", tuple(joints), reason)
    if group > 1:
        name = join(role.name, "query-heads")
        minus = views.head_columns(role.output, kv_heads, group, width)
        joints = []
        for query, _, _ in role.layouts():
            plus = tuple(
                replace(view, head_stride=query.head_stride or group * width)
                for view in views.heads(query, kv_heads, group, width)
            )
            joints.append(Joint(name, "query-heads", Permutation(group), kv_heads, group, plus, minus))
        yield Candidate(name, "query-heads", tuple(joints), reason)


@maker(Mlp)
def mlp_candidates(role: Role, views: Views) -> Iterator[Candidate]:
    """Up–down: any diagonal (GL without an activation), a positive one, degree 2; and the neurons' permutation."""
    assert isinstance(role, Mlp)
    width, experts = role.up.size, _batch(role.up)
    name = join(role.name, "up-down")
    plus, minus = views.rows(role.up, experts, width), views.columns(role.down, experts, width)

    def joint(kind: str, group: Group, plus: tuple[View, ...] = plus, minus: tuple[View, ...] = minus) -> Joint:
        return Joint(name, kind, group, experts, width, plus, minus)

    alternatives = [joint("up-down", Diagonal(width))]
    if role.gate is None:
        squared = views.columns(role.down, experts, width, power=2.0)
        alternatives.append(joint("up-down", PositiveDiagonal(width)))
        alternatives.append(joint("up-down-squared", PositiveDiagonal(width), minus=squared))
    elif role.swapped:
        alternatives.append(joint("up-down", Diagonal(width), views.rows(role.gate, experts, width)))
    yield Candidate(
        name,
        "up-down",
        tuple(alternatives),
        "the activation is not homogeneous: no scaling leaves the function",
        joint("up-down", GeneralLinear(width)) if role.gate is None else None,
    )
    gate = views.rows(role.gate, experts, width) if role.gate is not None else ()
    if width > 1:
        name = join(role.name, "neurons")
        neurons = Joint(name, "neurons", Permutation(width), experts, width, (*plus, *gate), minus)
        yield Candidate(name, "neurons", (neurons,), "units are not interchangeable between up and down")


def _batch(slot: Slot) -> int:
    """Equal layers in one tensor (experts); 1 for an ordinary layer."""
    layer = slot.parts
    return 1 if layer.heads is None else int(slot.weight.shape[layer.heads])


def norm_candidate(
    name: str, norm: nn.Module, readers: list[tuple[str, list[Slot]]], views: Views, width: int
) -> Candidate | None:
    """Norm gain (and bias) → the linear layers that read it; the likeliest reader first."""
    plus = views.gain(norm, width)
    if not plus:
        return None
    alternatives = []
    for _, slots in readers:
        minus = tuple(dict.fromkeys(view for slot in slots for view in views.columns(slot, 1, width)))
        if minus and all(slot.in_features == width for slot in slots):
            alternatives.append(Joint(f"{name}.readers", "norm-readers", Diagonal(width), 1, width, plus, minus))
    reason = "no set of linear layers reads this norm alone (a tied head keeps its gain)"
    if not alternatives:
        reason = "no linear layer was seen to read it: its gain acts on what goes on from here"
    return Candidate(f"{name}.readers", "norm-readers", tuple(alternatives), reason)
