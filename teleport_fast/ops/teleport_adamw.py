"""teleport_adamw_: a diagonal move and an AdamW step in one pass over parameters, gradients and moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import accumulation_dtype, as_list, check_views
from teleport_fast.ops.diagonal_action import powers_of
from teleport_fast.ops.resume import unwritten
from teleport_fast.ops.runs import check_in_place, check_rows, check_runs, per_tensor, written


def teleport_adamw_(
    parameters: Tensor | Sequence[Tensor],
    gradients: Tensor | Sequence[Tensor],
    first_moments: Tensor | Sequence[Tensor],
    second_moments: Tensor | Sequence[Tensor],
    s: Tensor,
    exponents: Sequence[float] = (1.0,),
    shifts: Sequence[float] | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    joints: int = 1,
) -> None:
    """Teleport by diag(s) and take AdamW's step, in place and in one pass: what `diagonal_action_`, then torch's AdamW do.

    Each list holds one view per entry, joint-major: (heads, h, n) or (heads, h, outer, inner), any strides, an entry's four
    views of one shape and dtype (float32, float64, bfloat16, float16). s: (joints·heads, h). With e of `exponents` and c
    of `shifts` (one per entry, or one per entry of a joint's run; e = 0 steps without a move) and f = s^e by rows:
    p ← (p + c) f − c, m ← m / f, v ← v / f², g = gradient / f; then p ← p (1 − lr·weight_decay),
    m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², p ← p − lr / (1 − β₁^step) · m / (√(v / (1 − β₂^step)) + eps).
    `step` counts this step, from 1. Gradients are read only: zero them afterwards, or move them by `diagonal_action_`.
    No two views may share an entry. Errors: TypeError and ValueError naming both shapes; RuntimeError if gradients are
    being recorded. Source: docs/mathematics.md, torch.optim.AdamW; checked by tests/ops/test_teleport_adamw.py.

    >>> p, g, m, v = (torch.full((1, 1, 1), x) for x in (1.0, 3.0, 0.0, 0.0))
    >>> teleport_adamw_(p, g, m, v, torch.tensor([[2.0]]), step=1, lr=0.5, weight_decay=0.0)
    >>> p, m
    (tensor([[[1.5000]]]), tensor([[[0.1500]]]))
    """
    lists = [as_list(tensors) for tensors in (parameters, gradients, first_moments, second_moments)]
    names = ("parameters", "gradients", "first_moments", "second_moments")
    parameters, gradients, first_moments, second_moments = lists
    check_runs("teleport_adamw_", parameters, joints, "parameters")
    first = check_views("teleport_adamw_", parameters, [], ("parameters", "parameters"), joints)
    for tensors, name in zip(lists[1:], names[1:], strict=True):
        _check_alike(parameters, tensors, name)
    check_rows("teleport_adamw_", "s", s, first, joints)
    powers = per_tensor("teleport_adamw_", "exponents", exponents, len(parameters), joints)
    offsets = per_tensor("teleport_adamw_", "shifts", shifts, len(parameters), joints)
    if not s.is_floating_point():
        raise TypeError(f"teleport_adamw_: s must be a floating tensor, got {s.dtype}; pass s.float()")
    if not (step >= 1 and lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ValueError(
            f"teleport_adamw_: step must be at least 1, lr, eps and weight_decay at least 0, betas in [0, 1), "
            f"got step={step}, lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}"
        )
    changed = [*parameters, *first_moments, *second_moments]
    check_in_place("teleport_adamw_", changed)
    numbers = (float(step), float(lr), float(betas[0]), float(betas[1]), float(eps), float(weight_decay))
    if direct([*changed, *gradients]):
        written(changed)
        _run_(parameters, gradients, first_moments, second_moments, s, powers, offsets, *numbers, joints)
    else:
        torch.ops.teleport_fast.teleport_adamw_(*lists, s, powers, offsets, *numbers, joints)


def _check_alike(parameters: Sequence[Tensor], tensors: Sequence[Tensor], name: str) -> None:
    if len(tensors) != len(parameters):
        raise ValueError(
            f"teleport_adamw_: parameters and {name} must be of one length, got {len(parameters)} and {len(tensors)}"
        )
    for index, (p, tensor) in enumerate(zip(parameters, tensors, strict=True)):
        if p.dtype != tensor.dtype or p.device != tensor.device or p.shape != tensor.shape:
            raise ValueError(
                f"teleport_adamw_: parameters[{index}] is {tuple(p.shape)} {p.dtype} on {p.device} and {name}[{index}] "
                f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; pass views of one shape, dtype and device"
            )


def reference_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    factors: Tensor,
    which: Sequence[int],
    shifts: Sequence[float],
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    joints: int,
) -> None:
    """The formula, in plain torch. Entry i moves by kind which[i] of factors (kinds, joints·heads, h), its gradient by kind
    which[count + i]."""
    count = len(parameters)
    placed = [*enumerate(zip(parameters, gradients, first_moments, second_moments, strict=True))]
    for i, tensors in unwritten(placed):
        heads, joint = tensors[0].shape[0], i * joints // count
        rows = (slice(joint * heads, (joint + 1) * heads), ..., *[None] * (tensors[0].dim() - 2))
        f, f_gradient = factors[which[i]][rows], factors[which[count + i]][rows]
        p, g, m, v = (tensor.to(factors.dtype) for tensor in tensors)
        p = (p + shifts[i]) * f - shifts[i] if shifts[i] else p * f
        g, m, v = g * f_gradient, m * f_gradient, v * f_gradient.square()
        m = m.lerp(g, 1 - beta1)
        v = v * beta2 + (1 - beta2) * g.square()
        denominator = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
        p = p * (1 - lr * weight_decay) - lr / (1 - beta1**step) * m / denominator
        for tensor, value in zip((tensors[0], tensors[2], tensors[3]), (p, m, v), strict=True):
            tensor.copy_(value)


_OP = Op("teleport_adamw_", reference_)


def _run_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    s: Tensor,
    exponents: Sequence[float],
    shifts: Sequence[float],
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    joints: int,
) -> None:
    lists = (parameters, gradients, first_moments, second_moments)
    factors, which = powers_of(s, [*exponents, *[-e for e in exponents]], accumulation_dtype(parameters[0].dtype))
    run = _OP.choose(parameters, size=s.shape[1])
    run(*lists, factors, which, shifts, step, lr, beta1, beta2, eps, weight_decay, joints)


_op_ = torch.library.custom_op(
    "teleport_fast::teleport_adamw_",
    _run_,
    mutates_args=("parameters", "first_moments", "second_moments"),
    schema="(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, Tensor s, "
    "float[] exponents, float[] shifts, float step, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "int joints) -> ()",
)


@_op_.register_fake
def _(*arguments: object) -> None:
    return None
