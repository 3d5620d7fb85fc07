"""What operators without layers do to hidden units: pass them on, tie them, scale them, or stop them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from teleport_fast.discovery.trace.products import elementwise_parameter
from teleport_fast.discovery.trace.tape import Alias, Rule, Tape
from teleport_fast.discovery.trace.units import BENT, FIXED, PINNED, POSITIVE

RULES: dict[str, Rule] = {}

SHAPES = (
    "view _unsafe_view reshape _reshape_alias transpose permute t expand unsqueeze squeeze slice select alias detach flip "
    "roll repeat unfold narrow split split_with_sizes chunk unbind unsafe_split unsafe_chunk index_select diagonal "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle movedim index gather take"
)
SAME = "clone contiguous _to_copy neg lift_fresh dropout"
SCALES = "mul div"
HOMOGENEOUS = "relu leaky_relu abs rrelu"
POINTWISE = (
    "gelu silu sigmoid tanh exp expm1 log log1p erf elu selu celu hardtanh relu6 hardswish hardsigmoid softplus log_sigmoid "
    "mish sin cos tan atan asinh sqrt rsqrt reciprocal sign threshold hardshrink softshrink clamp_max round floor ceil "
    "logit _softmax _log_softmax _safe_softmax softmax log_softmax log_sigmoid_forward nan_to_num"
)
REDUCTIONS = "mean sum amax amin max min var std linalg_vector_norm norm prod argmax logsumexp var_mean"


def rule(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


@rule("zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full")
def like(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    return tape.set(out, None)  # only the shape is read


@rule(SHAPES)
def shapes(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    known, operator = tape.known(args[0]), packet(tape)
    if known is None:
        return False
    source = known.view if isinstance(known, Alias) else known
    if isinstance(known, Tensor) and "view" in tape.current_name:
        operator = torch.ops.aten.reshape
    moved = operator(source, *args[1:], **kwargs)
    outs, moves = ([out], [moved]) if isinstance(out, Tensor) else (list(out), list(moved))
    if isinstance(known, Alias) and any(shape.untyped_storage()._cdata != _memory(known) for shape in moves):
        if not known.view.ndim:
            return False
        known, moves = tape.data(known), []  # repeated or gathered: no view any more, but data that it writes
        moved = operator(known, *args[1:], **kwargs)
        moves = [moved] if isinstance(moved, Tensor) else list(moved)
    for value, shape in zip(outs, moves, strict=True):
        tape.set(value, Alias(known.name, shape, known.shift) if isinstance(known, Alias) else shape.clone())
    return True


def _memory(alias: Alias) -> int:
    return int(alias.view.untyped_storage()._cdata)


def packet(tape: Tape) -> Any:
    """The operator at hand, out of place."""
    assert tape.current is not None
    name = tape.current.__name__
    return getattr(torch.ops.aten, name.rstrip("_")) if name.endswith("_") else tape.current


@rule(SAME)
def same(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if not (out.is_floating_point() or out.is_complex()):
        return pointwise(tape, out, args, kwargs)  # rounded to whole numbers
    return tape.set(out, tape.known(args[0]))


@rule(HOMOGENEOUS)
def homogeneous(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    label = tape.label(args[0])
    if label is None:
        return False
    tape.units.positive(label)
    return tape.set(out, label)


@rule("clamp_min clamp")
def clamp(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    bounds = [*args[1:], *kwargs.values()]
    if bounds[:1] == [0] and not any(bound is not None for bound in bounds[1:]):
        return homogeneous(tape, out, args, kwargs)
    return pointwise(tape, out, args, kwargs)


@rule(POINTWISE)
def pointwise(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    label = tape.label(args[0])
    if label is None or any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
        return False  # a bound for each unit keeps them apart
    tape.units.fix(label, f"{packet(tape).__name__} is not homogeneous")
    tape.units.mark(label, BENT)
    first = out if isinstance(out, Tensor) else out[0]
    return tape.set(first, label)


@rule("cumsum cumprod logcumsumexp")
def cumulate(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    label = tape.label(args[0])
    if label is None or bool((label.narrow(args[1], 0, 1) != label).any()):
        return False  # the order of the units would count
    return pointwise(tape, out, args, kwargs)


@rule("pow square")
def power(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    label = tape.label(args[0])
    exponent = args[1] if len(args) > 1 else 2
    if label is None or not isinstance(exponent, (int, float)) or exponent <= 0:
        return False
    tape.units.positive(label)
    return tape.set(out, tape.units.derive(label, float(exponent)))


@rule("prelu _prelu_kernel")
def prelu(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    label, slope = tape.label(args[0]), tape.known(args[1])
    if label is None or not isinstance(slope, Alias):
        return False
    tape.units.positive(label)
    if slope.view.numel() > 1:
        units = tape.units.derive(label, None)  # a slope sits in the unit's seat and has no scale
        tape.units.fix(units, "a slope has no scale")
        view = slope.view if slope.view.ndim == label.ndim else channels(slope.view, label.ndim)
        elementwise_parameter(tape, units, Alias(slope.name, view), ((1.0, units),))
    return tape.set(out, label)


@rule("add sub rsub")
def add(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    (x, y), values = (tape.known(arg) for arg in args[:2]), args[:2]
    if isinstance(x, Alias) and y is None and not isinstance(args[1], Tensor) and tape.current_name == "add":
        return tape.set(out, tape.with_shift(x, float(args[1]) * kwargs.get("alpha", 1)))
    if isinstance(x, Alias):  # of two parameters one is data; a constant added to one keeps it from moving
        if y is None:
            return False
        x = tape.data(x) if isinstance(y, Alias) else x
    if not isinstance(x, Tensor):
        x, y, values = y, x, values[::-1]
    if not isinstance(x, Tensor):
        return False
    label = x.expand(out.shape)
    if isinstance(y, Tensor):
        tape.units.tie(label, y.expand(out.shape))
    elif isinstance(y, Alias):
        if not elementwise_parameter(tape, label, y, ((1.0, label),)):
            return False
    elif not is_zero(values[1]):
        tape.units.fix(label, "a constant is added")
        uniform(tape, label, values[1])
    return tape.set(out, torch.where(label < 0, y.expand(out.shape), label) if isinstance(y, Tensor) else label)


@rule(SCALES)
def multiply(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    (x, y), values = (tape.known(arg) for arg in args[:2]), list(args[:2])
    if tape.current_name == "div" and y is not None:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            tape.units.fix(y, "it divides")
            tape.units.mark(y, BENT)
        else:
            return False
    if isinstance(x, Alias) and isinstance(y, Alias):
        x = tape.data(x)
    if not isinstance(x, Tensor) and isinstance(y, Tensor):
        x, y, values = y, x, values[::-1]
    if isinstance(x, Alias) or (x is None and isinstance(y, Alias)):
        alias = x if isinstance(x, Alias) else y
        other = values[1] if isinstance(x, Alias) else values[0]
        assert isinstance(alias, Alias)
        if isinstance(other, Tensor) and other.numel() > 1:
            if not alias.view.ndim:
                return False
            label = tape.data(alias).expand(out.shape)
            tape.units.mark(label, BENT)
            uniform(tape, label, other, dense_only=True)
            return tape.set(out, label)
        return tape.set(out, alias) if not alias.shift else False
    if not isinstance(x, Tensor):
        return False
    label = x.expand(out.shape)
    if isinstance(y, Alias):
        if y.view.numel() == 1:
            return tape.set(out, label)
        young = tape.units.derive(label, None)
        tape.units.mark(label, BENT)
        if not elementwise_parameter(tape, label, y, ((-1.0, label), (1.0, young))):
            return False
        return tape.set(out, young)
    if isinstance(y, Tensor):
        return tape.set(out, _product(tape, label, y.expand(out.shape)))
    uniform(tape, label, values[1], dense_only=True)
    return tape.set(out, label)


def _product(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """Units times units: a square, or a gate, of which one side passes its scale and the other must keep it."""
    units = tape.units
    if torch.equal(x, y):
        units.positive(x)
        return units.derive(x, 2.0)
    fixed_x, fixed_y = (_all(tape, side, FIXED) for side in (x, y))
    bounded = fixed_x and not fixed_y, not (fixed_x or fixed_y) and _all(tape, x, POSITIVE)
    gate, passes = (x, y) if any(bounded) else (y, x)  # of two that may pass, the one with both signs
    if not (fixed_x or fixed_y):
        units.fix(gate, "it is the gate of a product whose other side passes the scale")
    units.mark(x, BENT)
    units.mark(y, BENT)
    units.tie(units.derive(x, None), units.derive(y, None))  # seats only: the fresh units carry no scale
    return passes


def _all(tape: Tape, label: Tensor, flag: int) -> bool:
    return all(tape.units.scale_flags(tape.units.scale(u)[0]) & flag for u in torch.unique(label).tolist() if u >= 0)


def uniform(tape: Tape, label: Tensor, value: Any, dense_only: bool = False) -> None:
    """A constant that differs from unit to unit keeps them apart; one that does not, no."""
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return
    if not value.is_meta and bool((value == value.flatten()[0]).all()):
        return
    shape = (1,) * (label.ndim - value.ndim) + tuple(value.shape)
    for dim, size in enumerate(shape):
        if size > 1 and bool((label.narrow(dim, 0, 1) != label).any()):
            tape.units.mark(label, PINNED | BENT)
            tape.units.reasons.setdefault(int(label.max()), "a constant differs from unit to unit")
            if not dense_only:
                tape.units.fix(label, "a constant is added")
            return


def is_zero(value: Any) -> bool:
    """Whether a constant is zero throughout; what is on meta is not known to be."""
    if isinstance(value, Tensor):
        return not value.is_meta and not bool(value.any())
    return bool(value == 0)


@rule(REDUCTIONS)
def reduce(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    label, name = tape.label(args[0]), tape.current_name
    first = out if isinstance(out, Tensor) else out[0]
    if label is None:
        return False
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        return False
    dims = args[1] if len(args) > 1 and name not in ("linalg_vector_norm", "norm") else kwargs.get("dim")
    if name in ("linalg_vector_norm", "norm"):
        dims = args[2] if len(args) > 2 else kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else list(range(label.ndim)) if not dims else list(dims)
    kept = label
    for dim in dims:
        if bool((kept.narrow(dim, 0, 1) != kept).any()):
            tape.units.fix(label, f"{name} mixes the units")
            tape.units.mark(label, BENT)
            return tape.set(first, None)
        kept = kept.narrow(dim, 0, 1)
    if name not in ("mean", "sum"):
        tape.units.positive(label)
    if name not in ("mean", "sum", "amax", "amin", "max", "min", "std", "linalg_vector_norm", "norm"):
        tape.units.fix(label, f"{name} is not homogeneous")
    if first.ndim != kept.ndim:
        kept = kept.reshape(first.shape)
    return tape.set(first, kept)


@rule(
    "max_pool1d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d avg_pool1d "
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa"
)
def pool(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    label = tape.label(args[0])
    first = out if isinstance(out, Tensor) else out[0]
    if label is None or label.ndim != first.ndim:
        return False
    spatial = int(next(c for c in tape.current_name if c in "123"))
    for dim in range(label.ndim - spatial, label.ndim):
        if bool((label.narrow(dim, 0, 1) != label).any()):
            return False
        label = label.narrow(dim, 0, 1)
    if "max" in tape.current_name:
        tape.units.positive(label)
    return tape.set(first, label.expand(first.shape))


@rule("constant_pad_nd")
def pad(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    label = tape.label(args[0])
    if label is None or (len(args) > 2 and args[2] != 0):
        return False
    for i in range(len(args[1]) // 2):
        dim = label.ndim - 1 - i
        if out.shape[dim] == label.shape[dim]:
            continue
        if bool((label.narrow(dim, 0, 1) != label).any()):
            return False
        label = label.narrow(dim, 0, 1).expand(*label.shape[:dim], out.shape[dim], *label.shape[dim + 1 :])
    return tape.set(out, label)


@rule("cat stack")
def cat(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    parts = []
    for value in args[0]:
        known = tape.known(value)
        if isinstance(known, Alias):
            known = tape.data(known)
        parts.append(torch.full(value.shape, -1) if known is None else known)
    joined = (torch.cat if tape.current_name == "cat" else torch.stack)(parts, *args[1:], **kwargs)
    return tape.set(out, joined)


@rule("masked_fill where")
def masked(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    x, mask, other = args if tape.current_name == "masked_fill" else (args[1], args[0], args[2])
    label = tape.label(x)
    if label is None or tape.known(other) is not None:
        return False
    label = label.expand(out.shape)
    uniform(tape, label, mask, dense_only=True)
    uniform(tape, label, other)
    if not is_zero(other):
        tape.units.fix(label, "a constant is put in its place")
    return tape.set(out, label)


def channels(vector: Tensor, ndim: int) -> Tensor:
    """A vector as it meets the channels (dimension 1) of a value."""
    return vector.reshape(1, -1, *[1] * (ndim - 2)) if ndim > 1 else vector
