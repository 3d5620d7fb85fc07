"""The residual streams: every tensor that reads or writes one, gathered into one joint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from teleport_fast.discovery.candidates import Candidate, Views
from teleport_fast.discovery.flow import Flow
from teleport_fast.discovery.gains import gain_of, gain_shift, is_norm
from teleport_fast.discovery.roles import Role
from teleport_fast.discovery.slots import Layer, Slot, slot_of
from teleport_fast.symmetry.diagonal_groups import Permutation, Signs
from teleport_fast.symmetry.groups import Group, Orthogonal
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View


def stream_width(blocks: Sequence[Role]) -> int | None:
    """The width that most roles read; None without a block that reads and writes one width."""
    widths = Counter(
        slot.in_features
        for role in blocks
        for slot in role.reads()
        if any(writer.out_features == slot.in_features for writer in role.writes())
    )
    return widths.most_common(1)[0][0] if widths else None


@dataclass
class Stream:
    """One residual stream: its views, the gains that scale it, and the first gain that keeps it from turning."""

    width: int
    plus: list[View] = field(default_factory=list)
    minus: list[View] = field(default_factory=list)
    gains: list[View] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    unfolded: str | None = None


def streams(model: nn.Module, blocks: Sequence[Role], views: Views, flow: Flow) -> Iterator[tuple[str, Stream, Stream]]:
    """The spaces that layers write, in which tensors are added, and that layers read.

    Yields a name, the tensors that turn together, and those whose units keep one order (a superset: an activation stops
    a rotation, not an order).
    """
    slots = [(slot, True) for role in blocks for slot in (*role.reads(), *role.writes())]
    slots += [(slot, False) for slot in _other_slots(model, {id(slot.module) for slot, _ in slots})]
    found = []
    for space in flow.summed():
        stream = _gather(model, slots, views, flow, space, units=False)
        if stream is not None:
            ordered = _gather(model, slots, views, flow, flow.coarser(space), units=True)
            found.append((stream, ordered or stream))
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found.sort(key=lambda pair: min(order[writer] for writer in pair[0].writers))
    prefixes = [_prefix(stream.writers) for stream, _ in found]
    for index, (prefix, (stream, ordered)) in enumerate(zip(prefixes, found, strict=True)):
        if len(found) == 1:
            yield "residual", stream, ordered
        elif prefix and prefixes.count(prefix) == 1:
            yield f"{prefix}.residual", stream, ordered
        else:
            yield f"residual.{index}", stream, ordered


def _gather(
    model: nn.Module, slots: list[tuple[Slot, bool]], views: Views, flow: Flow, space: int, units: bool
) -> Stream | None:
    readers = [(slot, in_role) for slot, in_role in slots if space in flow.spaces_in(slot.module, units)]
    writers = [(slot, in_role) for slot, in_role in slots if space in flow.spaces_out(slot.module, units)]
    modules = dict(model.named_modules())
    tables = [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, nn.Embedding) and space in flow.spaces_out(module, units)
    ]
    if not readers:
        return None
    stream = Stream(Counter(slot.in_features for slot, _ in readers).most_common(1)[0][0])
    _write(stream, writers, tables, views)
    norms = [(name, m) for name, m in modules.items() if is_norm(m) and space in flow.spaces_in(m, units)]
    _normalise(stream, norms, views)
    _read(stream, readers, views)
    _bare(stream, model, views, flow, space, units)
    return stream if stream.writers else None


def _prefix(writers: list[str]) -> str:
    """The modules that all writers are in."""
    shared = []
    for parts in zip(*(writer.split(".") for writer in writers), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _other_slots(model: nn.Module, claimed: set[int]) -> Iterator[Slot]:
    """Layers that are in no role, whole; convolutions among them."""
    for name, module in model.named_modules():
        if id(module) in claimed:
            continue
        slot = slot_of(name, module)
        if slot is None and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
            rows: tuple[tuple[Tensor, int], ...] = ((module.weight, 0),)
            rows += () if module.bias is None else ((module.bias, 0),)
            layer = Layer(rows, ((module.weight, 1),), module.in_channels, module.out_channels)
            slot = Slot(name, module, 0, module.out_channels, tensors=layer)
        if slot is not None:
            yield slot


def _write(
    stream: Stream, writers: list[tuple[Slot, bool]], tables: list[tuple[str, nn.Embedding]], views: Views
) -> None:
    for slot, in_role in writers:
        if slot.out_features == slot.size == stream.width:
            stream.plus += views.rows(slot, 1, stream.width, counts=in_role)
            stream.writers.append(slot.layer)
    for name, table in tables:
        if table.embedding_dim == stream.width:
            stream.plus.append(views.axis(table.weight, 1, stream.width))
            stream.writers.append(name)


def _read(stream: Stream, readers: list[tuple[Slot, bool]], views: Views) -> None:
    turned = {(view.parameter, view.axis) for view in stream.plus}  # a tied table is turned once
    for slot, in_role in readers:
        if slot.in_features == stream.width:
            for view in views.columns(slot, 1, stream.width):
                if (view.parameter, view.axis) not in turned:
                    stream.minus.append(view if in_role else replace(view, counts=False))


def _normalise(stream: Stream, norms: list[tuple[str, nn.Module]], views: Views) -> None:
    for name, norm in norms:
        gain, bias = gain_of(norm), getattr(norm, "bias", None)
        if gain is not None and tuple(gain.shape) == (stream.width,):
            stream.gains.append(views.axis(gain, 0, stream.width))
            if gain.requires_grad or not bool((gain + gain_shift(norm) == 1).all()):
                stream.unfolded = stream.unfolded or name
        if isinstance(bias, nn.Parameter) and tuple(bias.shape) == (stream.width,):
            stream.plus.append(views.axis(bias, 0, stream.width))


def _bare(stream: Stream, model: nn.Module, views: Views, flow: Flow, space: int, units: bool) -> None:
    """Parameters used without a layer: positions and class tokens are added, layer scales multiply."""
    known = {view.parameter for view in (*stream.plus, *stream.minus, *stream.gains)}
    for name, parameter in model.named_parameters():
        if name in known or not parameter.ndim or parameter.shape[-1] != stream.width:
            continue
        if flow.space_of(parameter, units) == space:
            view = views.axis(parameter, parameter.ndim - 1, stream.width)
            (stream.gains if flow.multiplies(parameter) else stream.plus).append(view)
            if flow.multiplies(parameter):
                stream.unfolded = stream.unfolded or name


def residual_candidate(name: str, stream: Stream, ordered: Stream) -> Candidate:
    """O(d) or the rotations that fix the ones vector; else the order of the stream's units and their signs."""
    plus, minus = tuple(dict.fromkeys(stream.plus)), tuple(dict.fromkeys(stream.minus))
    width = stream.width

    def joint(part: str, group: Group, plus: tuple[View, ...] = plus, minus: tuple[View, ...] = minus) -> Joint:
        label, kind = (f"{name}.{part}", f"residual-{part}") if part else (name, "residual")
        return Joint(label, kind, group, 1, group.width, plus, minus)

    moved, read = (*ordered.plus, *ordered.gains), ordered.minus
    order = joint("order", Permutation(width), tuple(dict.fromkeys(moved)), tuple(dict.fromkeys(read)))
    signs = joint("signs", Signs(width)), joint("signs", Signs(1), _as_one(plus), _as_one(minus))
    rest = (
        Candidate(order.name, order.kind, (order,), "the units of the stream are told apart by something else"),
        Candidate(signs[0].name, signs[0].kind, signs, "something on the stream is not odd"),
    )
    if stream.unfolded is not None:
        reason = f"gain of {stream.unfolded!r} is not folded; call fold_norm_gains_(model) first"
        return Candidate(name, "residual", (), reason, fallback=rest)
    turns = joint("", Orthogonal(width)), joint("", Orthogonal(width, fixes_ones=True))
    return Candidate(name, "residual", turns, "something on the stream is not rotation-equivariant", fallback=rest)


def _as_one(views: tuple[View, ...]) -> tuple[View, ...]:
    """The same entries as one unit, so that one sign serves all."""
    return tuple(replace(v, width=1, repeats=v.width, repeat_stride=1, head_stride=v.width) for v in views)
