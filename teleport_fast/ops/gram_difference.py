"""gram_difference: S₋ − S₊ and tr S₊ + tr S₋ of joints' gradients, in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import accumulation_dtype, as_list, check_views


def gram_difference(
    G_plus: Tensor | Sequence[Tensor], G_minus: Tensor | Sequence[Tensor], joints: int = 1
) -> tuple[Tensor, Tensor]:
    """Half the Lie-algebra gradient of a joint's squared gradient norm, and that norm: D = S₋ − S₊, J = tr S₊ + tr S₋.

    G_plus, G_minus: a tensor or a list, each (heads, h, n) or (heads, h, outer, inner), any strides, float32, float64,
    bfloat16 or float16. With `joints` = B each list holds B equal runs, one per joint; S± = Σ G± G±ᵀ over a run.
    Returns D (joints·heads, h, h), bitwise symmetric, and J (joints·heads,): float64 for float64, float32 otherwise,
    accumulated so. Differentiable twice in every tensor. Errors: TypeError and ValueError naming both shapes;
    RuntimeError if the backend asked for cannot be used. Source: own derivation (dJ/dt = 2⟨S₋ − S₊, M⟩), checked by
    tests/ops/test_gram_difference.py.

    >>> gram_difference(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]))
    (tensor([[[4.]]]), tensor([14.]))
    """
    plus, minus = as_list(G_plus), as_list(G_minus)
    check_views("gram_difference", plus, minus, ("G_plus", "G_minus"), joints)
    if direct((*plus, *minus)):
        return _run(plus, minus, joints)
    result: tuple[Tensor, Tensor] = torch.ops.teleport_fast.gram_difference(plus, minus, joints)
    return result


def reference(plus: Sequence[Tensor], minus: Sequence[Tensor], joints: int) -> tuple[Tensor, Tensor]:
    """The formula, in plain torch."""
    heads, h = (*plus, *minus)[0].shape[:2]
    dtype = accumulation_dtype((*plus, *minus)[0].dtype)
    like = (*plus, *minus)[0]
    D = torch.zeros(joints, heads, h, h, dtype=dtype, device=like.device)
    J = torch.zeros(joints, heads, dtype=dtype, device=like.device)
    for sign, tensors in ((-1, plus), (1, minus)):
        for index, tensor in enumerate(tensors):
            joint = index * joints // len(tensors)
            G = tensor.flatten(2).to(dtype)
            D[joint].baddbmm_(G, G.mT, alpha=sign)
            J[joint] += G.square().sum((1, 2))
    D = D.flatten(0, 1)
    # A BLAS may round the two halves differently.
    return (D + D.mT) / 2, J.flatten()


_OP = Op("gram_difference", reference)


def _run(plus: Sequence[Tensor], minus: Sequence[Tensor], joints: int) -> tuple[Tensor, Tensor]:
    tensors = (*plus, *minus)
    result: tuple[Tensor, Tensor] = _OP.choose(tensors, size=tensors[0].shape[1])(plus, minus, joints)
    return result


@torch.library.custom_op(
    "teleport_fast::gram_difference",
    mutates_args=(),
    schema="(Tensor[] plus, Tensor[] minus, int joints) -> (Tensor, Tensor)",
)
def _op(plus: Sequence[Tensor], minus: Sequence[Tensor], joints: int) -> tuple[Tensor, Tensor]:
    return _run(plus, minus, joints)


@_op.register_fake
def _(plus: Sequence[Tensor], minus: Sequence[Tensor], joints: int) -> tuple[Tensor, Tensor]:
    like = (*plus, *minus)[0]
    heads, h = like.shape[:2]
    dtype = accumulation_dtype(like.dtype)
    return like.new_empty(joints * heads, h, h, dtype=dtype), like.new_empty(joints * heads, dtype=dtype)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    plus, minus, ctx.joints = inputs
    ctx.split = len(plus)
    ctx.save_for_backward(*plus, *minus)


def _backward(ctx, D_grad: Tensor, J_grad: Tensor):  # type: ignore[no-untyped-def]
    """dG± = ∓(D̄ + D̄ᵀ) G± + 2 J̄ G±, as torch ops, so that it is differentiable again."""
    symmetric = (D_grad + D_grad.mT).unflatten(0, (ctx.joints, -1))
    scale = 2 * J_grad.unflatten(0, (ctx.joints, -1))[..., None, None]

    def run(tensors: Sequence[Tensor], sign: int) -> list[Tensor]:
        grads = []
        for index, tensor in enumerate(tensors):
            joint = index * ctx.joints // len(tensors)
            G = tensor.flatten(2).to(symmetric.dtype)
            grads.append((sign * (symmetric[joint] @ G) + scale[joint] * G).reshape(tensor.shape).to(tensor.dtype))
        return grads

    saved = ctx.saved_tensors
    return run(saved[: ctx.split], -1), run(saved[ctx.split :], 1), None


_op.register_autograd(_backward, setup_context=_save)
