"""What an action refuses, each with the argument's name, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class HasForm(Protocol):
    """What check_teleport reads of an action."""

    form: str
    bias: bool
    hidden: str


def check_network(weights: Sequence[Tensor], X: Tensor, form: str, hidden: str, bias: bool) -> Tensor:
    """X, if weights, X and options fit together; else ValueError."""
    if form not in ("u_exact", "v_exact"):
        raise ValueError(f"form must be 'u_exact' or 'v_exact', got {form!r}")
    if hidden not in ("recomputed", "stale"):
        raise ValueError(f"hidden must be 'recomputed' or 'stale' (the published code's, not a symmetry), got {hidden!r}")
    if len(weights) < 2:
        raise ValueError(f"weights must hold at least two layers, got {len(weights)}; a single layer has no hidden space")
    if X.dim() != 2 or X.shape[1] < 1:
        raise ValueError(f"X must be (inputs, batch) with samples as columns, got {tuple(X.shape)}; pass inputs.mT")
    if X.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"X must be float32 or float64, got {X.dtype}; pass X.double()")
    width, source = X.shape[0], "X has rows"
    for index, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != width + bias:
            raise ValueError(f"weights[{index}] must be (out, {width + bias}) because {source} {width}"
                             f"{' and a bias column' if bias else ''}, got {tuple(weight.shape)}")
        if weight.dtype != X.dtype or weight.device != X.device:
            raise ValueError(f"weights[{index}] must be {X.dtype} on {X.device} like X, got {weight.dtype} on {weight.device}")
        if not all_finite(weight):
            raise ValueError(f"weights[{index}] must be finite, got NaN or infinity")
        width, source = len(weight), f"weights[{index}] has rows"
    if not all_finite(X):
        bad = (~torch.isfinite(X)).any(0).nonzero().flatten().tolist()
        raise ValueError(f"X must be finite, got NaN or infinity in columns {bad[:8]}; drop these samples")
    return X


def all_finite(A: Tensor) -> bool:
    """No NaN or infinity in A: its sum tells in a twentieth of the time, and every entry is looked at where that overflows."""
    return math.isfinite(float(A.sum())) or bool(torch.isfinite(A).all())


def check_elements(gs: Sequence[Tensor], widths: Sequence[int], like: Tensor) -> list[Tensor]:
    """The group elements in the weights' dtype, if there is a finite one of the right shape for every joint; else ValueError."""
    if len(gs) != len(widths):
        raise ValueError(f"gs must hold one element per hidden layer, got {len(gs)} for {len(widths)} layers of widths {list(widths)}")
    for m, (g, k) in enumerate(zip(gs, widths, strict=True)):
        if g.shape != (k, k):
            raise ValueError(f"gs[{m}] must be ({k}, {k}), got {tuple(g.shape)}")
        if not bool(torch.isfinite(g).all()):
            raise ValueError(f"gs[{m}] must be finite, got NaN or infinity; take a smaller step")
    return [g.detach().to(like) for g in gs]


def check_teleport(
    action: HasForm,
    steps: int,
    lr: float,
    cap: float,
    radius: float,
    group: str,
    parity: bool | str,
    published: Mapping[str, str],
) -> str:
    """The published code to follow ("" for none), if the arguments make sense; else ValueError."""
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive and finite, got {lr}; ascend=False goes down")
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}; leave it out for none")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be positive and finite, got {radius}; it bounds ‖T‖ of a step")
    if group not in ("exp", "linear"):
        raise ValueError(f"group must be 'exp' (exp T) or 'linear' (I + T), got {group!r}")
    if not parity:
        if action.hidden != "recomputed":
            raise ValueError("teleport follows hidden='recomputed'; pass parity=True for the published loop with stale inputs")
        return ""
    code = ("iclr24" if action.form == "v_exact" else "neurips22") if parity is True else str(parity)
    if published.get(code) != action.form:
        raise ValueError(f"parity must be one of {[c for c, f in published.items() if f == action.form]} for {action.form}, got {parity!r}")
    if action.bias:
        raise ValueError("parity follows the published code, which has no biases; pass a network without")
    return code
