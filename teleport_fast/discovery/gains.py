"""Norms and their gains: what counts as a norm, which tensor is its gain, and whether it is stored as 1 + w."""

from __future__ import annotations

import copy

import torch
from torch import nn

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
    gain = gain_of(norm)
    if gain is None or type(norm) in (nn.LayerNorm, nn.RMSNorm):
        return 0.0
    probe = copy.deepcopy(norm).to_empty(device="cpu") if gain.is_meta else copy.deepcopy(norm).cpu()
    for parameter in probe.parameters():
        parameter.zero_()
    x = torch.linspace(-1.0, 2.0, gain.numel(), dtype=gain.dtype).expand(1, 2, -1)
    try:
        return 1.0 if bool(probe(x).abs().sum() > 0) else 0.0
    except Exception:  # a norm that takes more than its input is not shifted; the probe decides anyway
        return 0.0
