"""What layers do to hidden units: products, convolutions and embeddings read and write them, norms stop their scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from teleport_fast.discovery.trace.products import contract, elementwise_parameter, read
from teleport_fast.discovery.trace.rules import add, channels, is_zero, multiply, rule
from teleport_fast.discovery.trace.tape import Alias, Tape
from teleport_fast.discovery.trace.units import BENT, PINNED


@rule("embedding")
def embedding(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    table = tape.known(args[0])
    if not isinstance(table, Alias) or table.shift:
        return False
    return tape.set(out, tape.data(table)[:1].expand(out.shape))


@rule("mm bmm matmul linear addmm baddbmm mv")
def product(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    name, bias = tape.current_name, None
    if name in ("addmm", "baddbmm"):
        if kwargs:
            return False
        bias, args = args[0], args[1:]
    x, w = args[0], args[1]
    if name == "linear":
        bias, x, w = (args[2] if len(args) > 2 else None), x, w
    known = tape.known(w)
    if tape.known(x) is None and isinstance(x, Tensor) and is_zero(x):  # a first hidden state: nothing is read
        given = tape.known(bias)
        return tape.set(out, tape.data(given).expand(out.shape) if isinstance(given, Alias) else None)
    if isinstance(known, Alias) and known.view.ndim == 3 and (known.view.stride(0) == 0 or len(known.view) == 1):
        known = Alias(known.name, known.view[0], known.shift)  # one weight, expanded over a batch
    if isinstance(known, Alias) and known.view.ndim == 2 and not known.shift and name not in ("matmul", "mv"):
        dims = (1, 0) if name == "linear" else (0, 1)
        units = read(tape, x, known, *dims)
        label = None if units is None else units.expand(out.shape)
    elif name in ("mm", "bmm", "addmm", "baddbmm"):
        label = contract(tape, x, w, out)
        if label is NotImplemented:
            return False
    else:
        return False
    tape.set(out, label)
    if bias is None or (not isinstance(bias, Tensor)):
        return True
    return add(tape, out, (out, bias), {}) if label is not None or tape.known(bias) is None else False


@rule("convolution _convolution mkldnn_convolution")
def convolution(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    x, bias, transposed, groups = args[0], args[2], args[6], args[8]
    weight = tape.known(args[1])
    if not isinstance(weight, Alias) or weight.shift or (transposed and groups > 1):
        return False
    units = read(tape, x, weight, 0 if transposed else 1, 1 if transposed else 0, channel=1, groups=groups)
    assert units is not None
    tape.set(out, units.reshape(1, -1, *[1] * (out.ndim - 2)).expand(out.shape))
    alias = tape.known(bias)
    if isinstance(alias, Alias):
        tape.use(alias, 0, units, 1.0)
        return True
    if isinstance(alias, Tensor):
        tape.units.tie(units, alias)
        return True
    return bias is None or add(tape, out, (out, channels(bias, out.ndim)), {})


@rule("native_layer_norm native_group_norm _fused_rms_norm rms_norm")
def norm(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    first = out if isinstance(out, Tensor) else out[0]
    grouped = tape.current_name == "native_group_norm"
    gain, bias = (args[1], args[2]) if grouped else (args[2], args[3] if "layer" in tape.current_name else None)
    label = tape.label(args[0])
    if label is not None:
        tape.units.fix(label, "a norm divides by the size of all units together")
        tape.units.mark(label, BENT)
        if grouped:
            parts = torch.arange(args[6]).repeat_interleave(label.shape[1] // args[6])
            tape.units.refine(label, parts.reshape(1, -1, *[1] * (label.ndim - 2)).expand(label.shape))
    return _gain_and_bias(tape, first, label, gain, bias, grouped)


def _gain_and_bias(tape: Tape, out: Tensor, label: Tensor | None, gain: Any, bias: Any, along_channels: bool) -> bool:
    for value, act in ((gain, multiply), (bias, add)):
        known = tape.known(value)
        if value is None:
            continue
        if not isinstance(known, Alias):
            return False  # a gain that is no parameter of its own
        view = channels(known.view, out.ndim) if along_channels else known.view
        if label is None:
            label = tape.units.new(view.numel()).reshape(view.shape).expand(out.shape)
            elementwise_parameter(tape, label, Alias(known.name, view, known.shift), ((1.0, label),))
            tape.units.mark(label, PINNED | BENT)  # what it normalises is told apart by the data
        else:
            tape.set(out, label)
            tape.set(value, Alias(known.name, view, known.shift))
            act(tape, out, (out, value), {})
            tape.set(value, None)
            label = tape.label(out)
    return tape.set(out, label)


@rule("native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm")
def batch_norm(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    label, statistics = tape.label(args[0]), [tape.buffers.get(id(value)) for value in args[3:5]]
    training = tape.current_name != "_native_batch_norm_legit_no_training" and bool(args[5])
    eps = float(args[-1])
    if label is not None:
        units = tape.column(label, 1)
        tape.units.mark(label, BENT)
        if training or None in statistics:
            tape.units.fix(label, "batch statistics leave the scale only up to eps")
        else:
            tape.units.positive(label)
            for name, exponent, shift in zip(statistics, (1.0, 2.0), (0.0, eps), strict=True):
                assert name is not None
                tape.use(Alias(name, tape.tensors[name]), 0, units, exponent, shift=shift)
        label = tape.units.derive(label, None)
        if args[1] is None:
            tape.units.fix(label, "a norm fixes its scale")
    return _gain_and_bias(tape, out[0], label, args[1], args[2], True)


@rule("_weight_norm_interface")
def weight_norm(tape: Tape, out: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    direction, size = tape.known(args[0]), tape.known(args[1])
    if not isinstance(direction, Alias) or not isinstance(size, Alias):
        return False
    tape.hide(direction, "weight norm divides it by its norm")
    dim = int(args[2]) if len(args) > 2 else 0
    units = tape.units.new(size.view.shape[dim])
    tape.use(size, dim, units, 1.0)
    tape.units.mark(units, PINNED | BENT)  # a permutation would have to move the direction too
    return tape.set(out[0], units.reshape([-1 if d == dim else 1 for d in range(out[0].ndim)]).expand(out[0].shape))
