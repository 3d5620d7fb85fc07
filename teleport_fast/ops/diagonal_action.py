"""diagonal_action_: every row of many strided views is multiplied by a power of its unit's scale, in place, all in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import accumulation_dtype, as_list, check_views
from teleport_fast.ops.resume import unwritten
from teleport_fast.ops.runs import check_in_place, check_rows, check_runs, per_tensor, written


def diagonal_action_(
    tensors: Tensor | Sequence[Tensor],
    s: Tensor,
    exponents: Sequence[float] = (1.0,),
    shifts: Sequence[float] | None = None,
    joints: int = 1,
) -> None:
    """Move many tensors by a diagonal g = diag(s), in place: A[head, row, …] ← (A + c) · s[head, row]^e − c.

    tensors: a view or a joint-major list of strided views, each (heads, h, n) or (heads, h, outer, inner), float32,
    float64, bfloat16 or float16. s: (joints·heads, h), floating. exponents e and shifts c: one per tensor of the list, or
    one per tensor of a joint's run. Parameters have e = ±1 (plus, minus), gradients and first moments ∓1, second moments
    ∓2, all times the view's power; c is 1 for gains stored as 1 + w. The factor is rounded to float32 (float64
    for float64), and the product is rounded once. Views of the same memory move in the list's order.
    Errors: TypeError and ValueError naming both shapes; ValueError for a view whose own entries overlap; RuntimeError if
    gradients are being recorded for a tensor. Source: docs/mathematics.md.

    >>> A = torch.ones(1, 2, 2)
    >>> diagonal_action_([A, A], torch.tensor([[2.0, 4.0]]), [1.0, -0.5])
    >>> A
    tensor([[[1.4142, 1.4142],
             [2.0000, 2.0000]]])
    """
    tensors = as_list(tensors)
    check_runs("diagonal_action_", tensors, joints)
    first = check_views("diagonal_action_", tensors, [], ("tensors", "tensors"), joints)
    check_rows("diagonal_action_", "s", s, first, joints)
    if not s.is_floating_point():
        raise TypeError(f"diagonal_action_: s must be a floating tensor, got {s.dtype}; pass s.float()")
    powers = per_tensor("diagonal_action_", "exponents", exponents, len(tensors), joints)
    offsets = per_tensor("diagonal_action_", "shifts", shifts, len(tensors), joints)
    check_in_place("diagonal_action_", tensors)
    if direct(tensors):
        written(tensors)
        _run_(tensors, s, powers, offsets, joints)
    else:
        torch.ops.teleport_fast.diagonal_action_(tensors, s, powers, offsets, joints)


def reference_(
    tensors: Sequence[Tensor], factors: Tensor, which: Sequence[int], shifts: Sequence[float], joints: int
) -> None:
    """The formula, in plain torch. factors: (kinds, joints·heads, h); tensor i takes kind which[i]."""
    for index, tensor in unwritten([*enumerate(tensors)]):
        heads, joint = tensor.shape[0], index * joints // len(tensors)
        factor = factors[which[index], joint * heads : (joint + 1) * heads]
        factor = factor.reshape(*factor.shape, *[1] * (tensor.dim() - 2))
        if shifts[index]:
            wide = tensor.to(factor.dtype)
            tensor.copy_((wide + shifts[index]) * factor - shifts[index])
        else:
            tensor.copy_(tensor.to(factor.dtype) * factor)


_OP = Op("diagonal_action_", reference_)


def powers_of(s: Tensor, exponents: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """(s^e for each distinct exponent (kinds, …) in `dtype`, the kind of each exponent): few powers serve many tensors."""
    kinds = list(dict.fromkeys(exponents))
    s = s.detach().to(torch.promote_types(s.dtype, dtype))
    factors = torch.stack([s if e == 1.0 else s.reciprocal() if e == -1.0 else s.pow(e) for e in kinds])
    return factors.to(dtype), [kinds.index(e) for e in exponents]


def _run_(
    tensors: Sequence[Tensor], s: Tensor, exponents: Sequence[float], shifts: Sequence[float], joints: int
) -> None:
    factors, which = powers_of(s, exponents, accumulation_dtype(tensors[0].dtype))
    _OP.choose(tensors, size=s.shape[1])(tensors, factors, which, shifts, joints)


@torch.library.custom_op(
    "teleport_fast::diagonal_action_",
    mutates_args=("tensors",),
    schema="(Tensor(a!)[] tensors, Tensor s, float[] exponents, float[] shifts, int joints) -> ()",
)
def _op_(
    tensors: Sequence[Tensor], s: Tensor, exponents: Sequence[float], shifts: Sequence[float], joints: int
) -> None:
    _run_(tensors, s, exponents, shifts, joints)


@_op_.register_fake
def _(tensors: Sequence[Tensor], s: Tensor, exponents: Sequence[float], shifts: Sequence[float], joints: int) -> None:
    return None
