"""What keeps tensors from moving, and what a reader of `explain()` should know about the proof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.plain_copy import is_quantized
from teleport_fast.symmetry.symmetries import Finding


def stuck(joint: Joint, tensors: Mapping[str, Tensor]) -> str | None:
    """Why the joint's parameters cannot all move, or None; `tensors` are the parameters of the user's model."""
    for name in joint.parameters():
        if name not in tensors:
            return f"{name!r} is quantized, a move would round it"
        if not tensors[name].is_floating_point():
            return f"{name!r} holds {_short(tensors[name].dtype)} numbers (quantized), a move would round it"
        if not tensors[name].requires_grad:
            return f"{name!r} is frozen (requires_grad=False), a move would change it"
    devices = {str(tensors[name].device) for name in joint.parameters()}
    if len(devices) > 1:
        return f"its tensors are on several devices ({', '.join(sorted(devices))}), and a move is one call on one of them"
    return None


def shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Each parameter whose memory another one overlaps (`nn.Parameter(other.data)`) → that other: one move, two tensors.

    A copy of the model, on which joints are proven, holds them apart.
    """
    ranges = defaultdict(list)
    for name, tensor in tensors.items():
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.numel():
            reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            start = int(tensor.storage_offset())
            ranges[tensor.untyped_storage()._cdata].append((start, start + int(reach), name))
    shared: dict[str, str] = {}
    for held in ranges.values():
        furthest, holder = -1, ""  # a long one may hold several that do not meet each other
        for start, last, name in sorted(held):
            if start <= furthest:
                shared.setdefault(name, holder)
                shared.setdefault(holder, name)
            if last > furthest:
                furthest, holder = last, name
    return shared


def notes(model: nn.Module) -> Iterator[Finding]:
    """One line each: tied tensors, shared modules, parametrizations, quantized weights, dtypes, devices."""
    yield from _shared(model)
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for tensor, steps in module.parametrizations.items():
                kinds = ", ".join(type(step).__name__.strip("_") for step in steps)
                reason = f"computed by {kinds} from parameters of its own; only these could move, and seldom exactly"
                yield Finding(f"{name}.{tensor}".lstrip("."), "parametrization", "noted", reason)
        if is_quantized(module):
            yield Finding(name, type(module).__name__, "skipped", "its weight is quantized, a move would round it")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() and not parameter.is_complex():
            reason = f"it holds {_short(parameter.dtype)} numbers (quantized), a move would round it"
            yield Finding(name, "parameter", "skipped", reason)
    floating = [p for p in model.parameters() if p.is_floating_point()]
    for dtype in sorted({_short(p.dtype) for p in floating if p.dtype not in (torch.float32, torch.float64)}):
        reason = f"proven on a float64 copy; a move of {dtype} parameters rounds to {dtype}"
        yield Finding("model", dtype, "noted", reason)
    devices = sorted({str(p.device) for p in floating})
    if "meta" in devices:
        yield Finding("model", "meta", "noted", "parameters on meta hold no numbers: what is proven is proven on a stand-in")
    elif len(devices) > 1:
        yield Finding("model", "devices", "noted", f"on {', '.join(devices)}: each joint moves on its own device")


def _shared(model: nn.Module) -> Iterator[Finding]:
    modules, tensors = defaultdict(list), defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters(recurse=False)):
            modules[id(module)].append(name)
    again = {name for names in modules.values() for name in names[1:]}
    for names in modules.values():
        if len(names) > 1:
            yield Finding(names[0], "shared module", "noted", f"also {', '.join(map(repr, names[1:]))}: it moves once")
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in again:
            tensors[id(tensor)].append(name)
    for names in tensors.values():
        if len(names) > 1:
            yield Finding(names[0], "tied", "noted", f"also {', '.join(map(repr, names[1:]))}: it moves once")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
