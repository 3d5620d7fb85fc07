"""The residual stream: every tensor that reads or writes it, gathered into one orthogonal joint."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from teleport_fast.discovery.candidates import Candidate, Views
from teleport_fast.discovery.roles import Attention, Mlp, Slot
from teleport_fast.symmetry.groups import Orthogonal
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.view import View

NORM_NAMES = ("norm", "ln", "layernorm", "rmsnorm")


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm, or a class whose name says norm and whose only parameters are vectors."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    named = type(module).__name__.lower().endswith(NORM_NAMES)
    return named and all(p.ndim == 1 for p in module.parameters(recurse=False))


def stream_width(blocks: list[Attention | Mlp]) -> int | None:
    """The width that most roles read; None without a block that reads and writes one width."""
    widths = Counter(
        slot.module.in_features
        for role in blocks
        for slot in role.reads()
        if (role.output if isinstance(role, Attention) else role.down).module.out_features == slot.module.in_features
    )
    return widths.most_common(1)[0][0] if widths else None


def residual_candidate(
    model: nn.Module, blocks: list[Attention | Mlp], views: Views, width: int
) -> tuple[Candidate | None, str]:
    """The joint of the whole stream, O(d) or the rotations that fix the ones vector, or why there is none."""
    claimed: set[int] = set()
    plus: list[View] = []
    minus: list[View] = []
    chains = [role for role in blocks if isinstance(role, Mlp) and role.chain]
    # of a Sequential only the first layer can read the stream and only the last can write it
    no_reader = {id(role.down.module) for role in chains}
    no_writer = {id(role.up.module) for role in chains}
    for role in blocks:
        writer = role.output if isinstance(role, Attention) else role.down
        for slot in role.reads():
            if slot.module.in_features == width and id(slot.module) not in no_reader:
                minus += views.columns(slot, 1, width)
        if writer.module.out_features == width and id(writer.module) not in no_writer:
            plus += _writes(writer, views, width)
        for slot in (*role.reads(), writer):
            claimed |= {id(p) for p in slot.module.parameters()}
    for name, module in model.named_modules():
        if is_norm(module):
            gain, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(gain, nn.Parameter) and tuple(gain.shape) == (width,):
                if gain.requires_grad or not bool((gain == 1).all()):
                    return None, f"gain of {name!r} is not folded; call fold_norm_gains_(model) first"
                claimed.add(id(gain))
            if isinstance(bias, nn.Parameter) and tuple(bias.shape) == (width,) and id(bias) not in claimed:
                plus.append(views.axis(bias, 0, width))
                claimed.add(id(bias))
        elif isinstance(module, nn.Embedding) and module.embedding_dim == width and id(module.weight) not in claimed:
            plus.append(views.axis(module.weight, 1, width))
            claimed.add(id(module.weight))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features == width and id(module.weight) not in claimed:
            minus.append(views.axis(module.weight, 1, width))
            claimed |= {id(p) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in claimed and parameter.ndim and parameter.shape[-1] == width:
            plus.append(views.axis(parameter, parameter.ndim - 1, width))
    if not plus or not minus:
        return None, f"no stream of width {width}: nothing {'reads' if plus else 'writes'} one outside a chain"
    alternatives = tuple(
        Joint("residual", "residual", group, 1, width, tuple(dict.fromkeys(plus)), tuple(dict.fromkeys(minus)))
        for group in (Orthogonal(width), Orthogonal(width, fixes_ones=True))
    )
    return Candidate("residual", "residual", alternatives, "something on the stream is not rotation-equivariant"), ""


def _writes(slot: Slot, views: Views, width: int) -> list[View]:
    weight = View(views.names[id(slot.module.weight)], 0, 1, width, slot.start)
    if slot.bias is None:
        return [weight]
    return [weight, View(views.names[id(slot.bias)], 0, 1, width, slot.start, counts=False)]


def frozen(joint: Joint, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the joint's parameters that do not train."""
    return [name for name in joint.parameters() if not tensors[name].requires_grad]
