"""square_sums: row sums of squares and of absolute values of many strided views, the input of every diagonal joint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import accumulation_dtype, check_views
from teleport_fast.ops.runs import check_runs


def square_sums(tensors: Sequence[Tensor], joints: int = 1) -> tuple[Tensor, Tensor]:
    """Sums of squares and of absolute values over the columns of each joint's views: (Σ x², Σ |x|) by rows.

    tensors: joint-major list of strided views, each (heads, h, n) or (heads, h, outer, inner), float32, float64, bfloat16
    or float16; the first len/joints belong to joint 0. Returns (squares, l1), each (joints·heads, h): float64 for float64,
    float32 otherwise. Differentiable twice in every tensor (|x| has the slope 0 at 0). Errors: TypeError and ValueError
    naming both shapes; ValueError if the list does not divide into `joints` equal runs; RuntimeError if the backend asked
    for cannot be used. Source: docs/mathematics.md (a, b, α, β).

    >>> square_sums([torch.tensor([[[1.0, -2.0], [3.0, 0.0]]])])
    (tensor([[5., 9.]]), tensor([[3., 3.]]))
    """
    tensors = list(tensors)
    check_runs("square_sums", tensors, joints)
    check_views("square_sums", tensors, [], ("tensors", "tensors"), joints)
    if direct(tensors):
        return _run(tensors, joints)
    result: tuple[Tensor, Tensor] = torch.ops.teleport_fast.square_sums(tensors, joints)
    return result


def reference(tensors: Sequence[Tensor], joints: int) -> tuple[Tensor, Tensor]:
    """The formula, in plain torch."""
    run = len(tensors) // joints
    squares, l1 = [], []
    for first in range(0, len(tensors), run):
        rows = [t.flatten(2).to(accumulation_dtype(t.dtype)) for t in tensors[first : first + run]]
        squares.append(sum((row.square().sum(2) for row in rows[1:]), rows[0].square().sum(2)))
        l1.append(sum((row.abs().sum(2) for row in rows[1:]), rows[0].abs().sum(2)))
    return torch.cat(squares), torch.cat(l1)


_OP = Op("square_sums", reference)


def _run(tensors: Sequence[Tensor], joints: int) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _OP.choose(tensors, size=tensors[0].shape[1])(tensors, joints)
    return result


@torch.library.custom_op(
    "teleport_fast::square_sums", mutates_args=(), schema="(Tensor[] tensors, int joints) -> (Tensor, Tensor)"
)
def _op(tensors: Sequence[Tensor], joints: int) -> tuple[Tensor, Tensor]:
    return _run(tensors, joints)


@_op.register_fake
def _(tensors: Sequence[Tensor], joints: int) -> tuple[Tensor, Tensor]:
    like = tensors[0]
    heads, h = like.shape[:2]
    dtype = accumulation_dtype(like.dtype)
    return like.new_empty(joints * heads, h, dtype=dtype), like.new_empty(joints * heads, h, dtype=dtype)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tensors, ctx.joints = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, squares_grad: Tensor, l1_grad: Tensor):  # type: ignore[no-untyped-def]
    """dx = 2 x · ȳ_squares + sign(x) · ȳ_l1, as torch ops, so that it is differentiable again."""
    of_squares, of_l1 = (grad.unflatten(0, (ctx.joints, -1)) for grad in (squares_grad, l1_grad))
    grads, saved = [], ctx.saved_tensors
    for index, tensor in enumerate(saved):
        joint = index * ctx.joints // len(saved)
        x = tensor.to(of_squares.dtype)
        rows = (..., *[None] * (tensor.dim() - 2))
        grad = 2 * x * of_squares[joint][rows] + x.sign() * of_l1[joint][rows]
        grads.append(grad.to(tensor.dtype))
    return grads, None


_op.register_autograd(_backward, setup_context=_save)
