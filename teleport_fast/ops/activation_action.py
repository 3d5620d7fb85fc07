"""activation_action: a layer's preactivations moved so that its activations move linearly, Z → σ⁻¹(g σ(Z)), and the tangent of that move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import STORAGE, accumulation_dtype


def activation_action(Z: Tensor, g: Tensor, negative_slope: float | Tensor) -> Tensor:
    """σ⁻¹(g σ(Z)), σ = LeakyReLU (PReLU) of slope a > 0: σ(z) = z for z ≥ 0, a z for z < 0; the result Z' has σ(Z') = g σ(Z).

    Z: (h, B) or (batch, h, B), g: (h, h) or (batch, h, h), any strides, float32, float64, bfloat16 or float16; a missing
    batch is shared. negative_slope: a number, or a tensor of one slope, (1,) or (), or of one per row, (h,). The result
    is contiguous, in Z's dtype; products are summed in float32 (float64 for float64) and rounded once. Differentiable
    twice in Z, g and a tensor slope; 0 belongs to the positive side, σ'(0) = 1. Errors: TypeError for dtypes;
    ValueError naming both shapes, and for a slope that is not positive and finite, which has no σ⁻¹ (a tensor slope is
    read for that on the CPU only: elsewhere it would wait for the device). Source: [NeurIPS22 eq. 8], docs/mathematics.md.

    >>> activation_action(torch.tensor([[-2.0, 1.0]]), torch.tensor([[-3.0]]), 0.5)
    tensor([[ 3., -6.]])
    """
    arguments = _checked("activation_action", Z, "g", g, negative_slope)
    result = _run(*arguments) if direct(arguments) else torch.ops.teleport_fast.activation_action(*arguments)
    return result[0] if Z.dim() == g.dim() == 2 else result


def activation_action_tangent(Z: Tensor, M: Tensor, negative_slope: float | Tensor) -> Tensor:
    """(M σ(Z)) / σ'(Z): how activation_action(Z, exp(t M), negative_slope) sets out at t = 0.

    Arguments, result, derivatives and errors as for `activation_action`, M: (h, h) or (batch, h, h). Source: docs/mathematics.md.

    >>> activation_action_tangent(torch.tensor([[-2.0, 1.0]]), torch.tensor([[3.0]]), 0.5)
    tensor([[-6.,  3.]])
    """
    arguments = _checked("activation_action_tangent", Z, "M", M, negative_slope)
    ours = direct(arguments)
    result = _run_tangent(*arguments) if ours else torch.ops.teleport_fast.activation_action_tangent(*arguments)
    return result[0] if Z.dim() == M.dim() == 2 else result


def reference(Z: Tensor, g: Tensor, slope: Tensor) -> Tensor:
    """The formula, in plain torch. Z (batch, h, B); g (batch or 1, h, h) and slope (h,) in the accumulator's type."""
    moved = g @ torch.nn.functional.prelu(Z.to(g.dtype), slope)
    return torch.nn.functional.prelu(moved, slope.reciprocal()).to(Z.dtype)


def reference_tangent(Z: Tensor, M: Tensor, slope: Tensor) -> Tensor:
    """The formula, in plain torch, arguments as for `reference`."""
    wide = Z.to(M.dtype)
    moved = M @ torch.nn.functional.prelu(wide, slope)
    return torch.where(wide < 0, moved / slope[:, None], moved).to(Z.dtype).contiguous()


_OP, _TANGENT = Op("activation_action", reference), Op("activation_action_tangent", reference_tangent)


def _checked(op: str, Z: Tensor, name: str, matrix: Tensor, slope: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z (batch, h, B), the matrix (batch, h, h) and the slopes, (1,) or (h,), without a copy."""
    for label, tensor in (("Z", Z), (name, matrix)):
        if tensor.dtype not in STORAGE:
            kinds = "float32, float64, bfloat16 or float16"
            raise TypeError(f"{op}: {label} must be {kinds}, got {tensor.dtype}; convert it first")
        if tensor.device != Z.device:
            raise ValueError(f"{op}: Z is on {Z.device}, {label} on {tensor.device}; move one of them")
    h = Z.shape[-2] if Z.dim() in (2, 3) else -1
    batches = {tensor.shape[0] for tensor in (Z, matrix) if tensor.dim() == 3}
    if h < 0 or matrix.dim() not in (2, 3) or matrix.shape[-2:] != (h, h) or len(batches) > 1:
        raise ValueError(
            f"{op}: Z must be (h, B) or (batch, h, B) and {name} (h, h) or (batch, h, h), got {tuple(Z.shape)} and "
            f"{tuple(matrix.shape)}; pass one (h, h) matrix for all columns, or one per batch"
        )
    batch, shape = batches.pop() if batches else 1, tuple(Z.shape)
    Z, matrix = (t if t.dim() == 3 else t.expand(batch, *t.shape) for t in (Z, matrix))
    if not isinstance(slope, Tensor):
        limits = torch.finfo(accumulation_dtype(Z.dtype))
        if not limits.tiny <= slope <= limits.max:
            raise _not_invertible(op, slope)
        return Z, matrix, Z.new_full((1,), slope, dtype=accumulation_dtype(Z.dtype))
    if slope.dtype not in STORAGE:
        raise TypeError(f"{op}: negative_slope must be a floating tensor, got {slope.dtype}; pass negative_slope.float()")
    if slope.device != Z.device:
        raise ValueError(f"{op}: Z is on {Z.device}, negative_slope on {slope.device}; move one of them")
    if slope.dim() > 1 or slope.numel() not in (1, h):
        raise ValueError(
            f"{op}: negative_slope must be () or (1,) or ({h},) for Z of shape {shape}, got "
            f"{tuple(slope.shape)}; pass one slope, or one per row"
        )
    return Z, matrix, slope.reshape(-1)


def _not_invertible(op: str, slope: float) -> ValueError:
    return ValueError(
        f"{op}: negative_slope must be positive and finite, got {slope}; an activation with another slope has no inverse: "
        f"pass a small positive slope such as 0.01"
    )


def _computed(op: Op, Z: Tensor, matrix: Tensor, slope: Tensor) -> Tensor:
    dtype = accumulation_dtype(Z.dtype)
    slope = slope.detach().to(dtype)
    if slope.device.type == "cpu" and slope.numel():
        low, high = (value.item() for value in slope.aminmax())
        limits = torch.finfo(dtype)
        if not (low >= limits.tiny and high <= limits.max):
            raise _not_invertible(op.name, low if not low >= limits.tiny else high)
    # A matrix that all batches share is not copied for each of them.
    matrix = matrix.detach()[:1] if matrix.stride(0) == 0 else matrix.detach()
    matrix, slope = matrix.to(dtype).contiguous(), slope.expand(Z.shape[1]).contiguous()
    result: Tensor = op.choose((Z,), size=Z.shape[1])(Z.detach(), matrix, slope)
    return result


def _run(Z: Tensor, g: Tensor, slope: Tensor) -> Tensor:
    return _computed(_OP, Z, g, slope)


def _run_tangent(Z: Tensor, M: Tensor, slope: Tensor) -> Tensor:
    return _computed(_TANGENT, Z, M, slope)


@torch.library.custom_op(
    "teleport_fast::activation_action", mutates_args=(), schema="(Tensor Z, Tensor g, Tensor negative_slope) -> Tensor"
)
def _op(Z: Tensor, g: Tensor, negative_slope: Tensor) -> Tensor:
    return _run(Z, g, negative_slope)


@torch.library.custom_op(
    "teleport_fast::activation_action_tangent",
    mutates_args=(),
    schema="(Tensor Z, Tensor M, Tensor negative_slope) -> Tensor",
)
def _op_tangent(Z: Tensor, M: Tensor, negative_slope: Tensor) -> Tensor:
    return _run_tangent(Z, M, negative_slope)


@_op.register_fake
def _(Z: Tensor, g: Tensor, negative_slope: Tensor) -> Tensor:
    return Z.new_empty(Z.shape)


@_op_tangent.register_fake
def _(Z: Tensor, M: Tensor, negative_slope: Tensor) -> Tensor:
    return Z.new_empty(Z.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output)


def _backward_with(
    divided: Callable[[Tensor, Tensor], Tensor],
) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """The derivative of (A σ(Z)) / d, d = a where `divided(Z, result) < 0` and else 1, as torch ops: differentiable again.

    W = Ȳ / d, dA = W σ(Z)ᵀ, dZ = (Aᵀ W) ⊙ σ'(Z), da = Σ_{z<0} (Aᵀ W) z − Σ_{d=a} Ȳ Y / a. The sign of the result is that
    of g σ(Z), so that the product is not computed again.
    """

    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        dtype = accumulation_dtype(ctx.saved_tensors[0].dtype)
        Z, matrix, slope, Y = (t.to(dtype) for t in ctx.saved_tensors)
        a, negative, low = slope[:, None], Z < 0, divided(Z, Y) < 0
        grad = grad.to(dtype)
        W = torch.where(low, grad / a, grad)
        dS = matrix.mT @ W
        dA = W @ torch.where(negative, a * Z, Z).mT
        da = None
        if ctx.needs_input_grad[2]:
            each = torch.where(negative, dS * Z, 0.0) - torch.where(low, grad * Y / a, 0.0)
            per_row = each.sum((0, 2))
            da = (per_row if slope.numel() == per_row.numel() else per_row.sum(0, keepdim=True)).to(
                ctx.saved_tensors[2].dtype
            )
        dZ = torch.where(negative, a * dS, dS)
        return dZ.to(ctx.saved_tensors[0].dtype), dA.to(ctx.saved_tensors[1].dtype), da

    return backward


_op.register_autograd(_backward_with(lambda Z, Y: Y), setup_context=_save)
_op_tangent.register_autograd(_backward_with(lambda Z, Y: Z), setup_context=_save)
