"""group_action: g moves a joint's tensors, A₊ → g A₊ and A₋ → g⁻ᵀ A₋; group_action_ does it in place, many at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import accumulation_dtype, as_list, check_matrix, check_views
from teleport_fast.ops.inverse import inverse
from teleport_fast.ops.resume import unwritten


def group_action(A_plus: Tensor, A_minus: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A joint's tensors after g: (g A₊, g⁻ᵀ A₋), new tensors.

    A_plus, A_minus: (heads, h, n) or (heads, h, outer, inner), any strides, float32, float64, bfloat16 or float16;
    g (heads, h, h), invertible. Results are contiguous, in the dtypes of A_plus and A_minus. Differentiable twice in
    all three. Errors: TypeError and ValueError naming both shapes; torch.linalg.LinAlgError for a singular
    g on the CPU (elsewhere its A₋ is NaN, nothing is waited for). Source: docs/mathematics.md.

    >>> group_action(torch.ones(1, 1, 2), torch.ones(1, 1, 1), torch.tensor([[[2.0]]]))
    (tensor([[[2., 2.]]]), tensor([[[0.5000]]]))
    """
    first = check_views("group_action", [A_plus], [A_minus], ("A_plus", "A_minus"), 1)
    check_matrix("group_action", "g", g, first, 1)
    if direct((A_plus, A_minus, g)):
        return _run(A_plus, A_minus, g)
    result: tuple[Tensor, Tensor] = torch.ops.teleport_fast.group_action(A_plus, A_minus, g)
    return result


def group_action_(
    plus: Tensor | Sequence[Tensor],
    minus: Tensor | Sequence[Tensor],
    g: Tensor,
    g_inverse_t: Tensor | None = None,
    joints: int = 1,
) -> None:
    """Move many tensors in place: those in `plus` become g A, those in `minus` become g⁻ᵀ A.

    plus, minus: a tensor or a list of strided views, each (heads, h, n) or (heads, h, outer, inner), float32, float64,
    bfloat16 or float16; with `joints` = B each list holds B equal runs, one per joint. g: (joints·heads, h, h);
    g_inverse_t: the same, where it is known already. Parameters and contragredient gradients or momenta go into
    opposite lists, so that one call moves everything. Views of the same memory move in the order plus, minus.
    Errors: TypeError and ValueError naming both shapes; ValueError for a view whose own entries overlap;
    RuntimeError if gradients are being recorded for a tensor. Source: docs/mathematics.md.

    >>> A = torch.ones(1, 1, 2)
    >>> group_action_(A, [], torch.tensor([[[2.0]]]))
    >>> A
    tensor([[[2., 2.]]])
    """
    plus, minus = as_list(plus), as_list(minus)
    first = check_views("group_action_", plus, minus, ("plus", "minus"), joints)
    check_matrix("group_action_", "g", g, first, joints)
    if g_inverse_t is not None:
        check_matrix("group_action_", "g_inverse_t", g_inverse_t, first, joints)
    tensors = (*plus, *minus)
    for tensor in tensors:
        if not tensor.is_contiguous() and _overlaps_itself(tensor):
            raise ValueError(
                f"group_action_: entries of a view of shape {tuple(tensor.shape)} and strides {tensor.stride()} "
                f"share memory; pass a view whose entries are distinct"
            )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("group_action_: a tensor requires grad; call under torch.no_grad(), or use group_action")
    if direct(tensors):
        # first what can raise: once the kernel has written, nothing does
        versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        torch.autograd.graph.increment_version(versioned)
        _run_(plus, minus, g, g_inverse_t, joints)
    else:
        torch.ops.teleport_fast.group_action_(plus, minus, g, g_inverse_t, joints)


def reference_(plus: Sequence[Tensor], minus: Sequence[Tensor], g: Tensor, g_inverse_t: Tensor, joints: int) -> None:
    """The formula, in plain torch."""
    sides = ((g, plus), (g_inverse_t, minus))
    placed = [(matrices, i * joints // len(side), A) for matrices, side in sides for i, A in enumerate(side)]
    for matrices, joint, tensor in unwritten(placed):
        heads = tensor.shape[0]
        A = tensor.flatten(2).to(g.dtype)
        tensor.copy_((matrices[joint * heads : (joint + 1) * heads] @ A).view(tensor.shape))


_OP = Op("group_action_", reference_)


def _run_(plus: Sequence[Tensor], minus: Sequence[Tensor], g: Tensor, g_inverse_t: Tensor | None, joints: int) -> None:
    tensors = (*plus, *minus)
    dtype = accumulation_dtype(tensors[0].dtype)
    if g_inverse_t is None:
        g_inverse_t = _inverse_t(g) if minus else g
    matrices = (g.detach().to(dtype).contiguous(), g_inverse_t.detach().to(dtype).contiguous())
    _OP.choose(tensors, size=g.shape[1])(plus, minus, *matrices, joints)


def _run(A_plus: Tensor, A_minus: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(A_plus.dtype)
    moved = [A.clone(memory_format=torch.contiguous_format) for A in (A_plus, A_minus)]
    kernel = _OP.choose(moved, size=g.shape[1])
    kernel([moved[0]], [moved[1]], g.to(dtype).contiguous(), _inverse_t(g).to(dtype).contiguous(), 1)
    return moved[0], moved[1]


def _inverse_t(g: Tensor) -> Tensor:
    return inverse(g.to(accumulation_dtype(g.dtype))).mT


def _overlaps_itself(tensor: Tensor) -> bool:
    """False only if every entry is distinct for certain: each stride clears what the smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


@torch.library.custom_op(
    "teleport_fast::group_action_",
    mutates_args=("plus", "minus"),
    schema="(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor g, Tensor? g_inverse_t, int joints) -> ()",
)
def _op_(plus: Sequence[Tensor], minus: Sequence[Tensor], g: Tensor, g_inverse_t: Tensor | None, joints: int) -> None:
    _run_(plus, minus, g, g_inverse_t, joints)


@_op_.register_fake
def _(plus: Sequence[Tensor], minus: Sequence[Tensor], g: Tensor, g_inverse_t: Tensor | None, joints: int) -> None:
    return None


@torch.library.custom_op(
    "teleport_fast::group_action",
    mutates_args=(),
    schema="(Tensor plus, Tensor minus, Tensor g) -> (Tensor, Tensor)",
)
def _op(plus: Tensor, minus: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return _run(plus, minus, g)


@_op.register_fake
def _(plus: Tensor, minus: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return plus.new_empty(plus.shape), minus.new_empty(minus.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, plus_grad: Tensor, minus_grad: Tensor):  # type: ignore[no-untyped-def]
    """dA₊ = gᵀ Ȳ₊, dA₋ = g⁻¹ Ȳ₋, dg = Ȳ₊ A₊ᵀ − (g⁻ᵀ A₋) (g⁻¹ Ȳ₋)ᵀ, as torch ops, so that it is differentiable again."""
    plus, minus, g = ctx.saved_tensors
    dtype = accumulation_dtype(plus.dtype)
    matrix = g.to(dtype)
    inverted = inverse(matrix)
    A_plus, A_minus, Y_plus, Y_minus = (t.flatten(2).to(dtype) for t in (plus, minus, plus_grad, minus_grad))
    dA_plus, dA_minus = matrix.mT @ Y_plus, inverted @ Y_minus
    dg = Y_plus @ A_plus.mT - (inverted.mT @ A_minus) @ dA_minus.mT
    return dA_plus.reshape(plus.shape).to(plus.dtype), dA_minus.reshape(minus.shape).to(minus.dtype), dg.to(g.dtype)


_op.register_autograd(_backward, setup_context=_save)
