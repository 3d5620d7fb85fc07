"""Norms and their gains: what counts as a norm, which tensor is its gain, and whether it is stored as 1 + w."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

NORM_NAMES = ("norm", "ln", "layernorm", "rmsnorm")


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm, or a class whose name says norm and whose only parameters are vectors."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    named = type(module).__name__.lower().endswith((*NORM_NAMES, "layernorm1p"))
    return named and all(p.ndim == 1 for p in module.parameters(recurse=False))


def gain_of(norm: nn.Module) -> nn.Parameter | None:
    gain = getattr(norm, "weight", None)
    return gain if isinstance(gain, nn.Parameter) else None


@torch.no_grad()
def gain_shift(norm: nn.Module) -> float:
    """1.0 where the norm multiplies by 1 + w, 0.0 where it multiplies by w: read off a copy's output at w = 0."""
    if type(norm) in (nn.LayerNorm, nn.RMSNorm):
        return 0.0
    output = _output(norm, 0.0, torch.linspace(-1.0, 2.0, _width(norm), device="cpu"))
    return 1.0 if output is not None and bool(output.abs().sum() > 0) else 0.0


@torch.no_grad()
def centres(norm: nn.Module) -> bool:
    """Whether the norm takes the mean away (LayerNorm), so that no unit's sign stands alone."""
    x = torch.linspace(-1.0, 2.0, _width(norm), device="cpu").square()
    first, second = (_output(norm, 1.0, x + c) for c in (0.0, 3.0))
    return first is None or second is None or bool((first - second).abs().max() < 1e-3)


def _width(norm: nn.Module) -> int:
    gain = gain_of(norm)
    return 2 if gain is None else gain.numel()


def _output(norm: nn.Module, gain: float, x: Tensor) -> Tensor | None:
    """What a copy of the norm with this gain and no bias gives; None if it takes more than its input."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    for name, parameter in probe.named_parameters():
        parameter.fill_(0.0 if name == "bias" else gain)
    try:
        output = probe(x.expand(1, 2, -1))
    except Exception:  # its own kind of call: neither shifted nor known, the probe decides
        return None
    return output if isinstance(output, Tensor) else None
