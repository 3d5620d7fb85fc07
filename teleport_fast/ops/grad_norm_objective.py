"""grad_norm_objective: what a joint's squared gradient norm becomes under g, J = tr(P⁻¹S₊) + tr(P S₋), for many g at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import accumulation_dtype, as_list, check_matrix, check_views
from teleport_fast.ops.inverse import inverse


def grad_norm_objective(
    G_plus: Tensor | Sequence[Tensor], G_minus: Tensor | Sequence[Tensor], g: Tensor, joints: int = 1
) -> Tensor:
    """‖g⁻ᵀ G₊‖² + ‖g G₋‖² = tr(P⁻¹S₊) + tr(P S₋), P = gᵀ g: the squared gradient norm after g, per head and candidate.

    G_plus, G_minus: a tensor or a list, each (heads, h, n) or (heads, h, outer, inner), any strides, float32, float64,
    bfloat16 or float16; with `joints` = B each list holds B equal runs, one per joint; S± = Σ G± G±ᵀ over a joint's run.
    g: (joints·heads, h, h), or (candidates, joints·heads, h, h) for a line search, which shares the Grams; a singular g
    gives inf. Returns J (joints·heads,) or (candidates, joints·heads): float64 for float64 tensors, float32 otherwise.
    Differentiable twice in all three. Errors: TypeError and ValueError naming both shapes; RuntimeError if the backend
    asked for cannot be used. Source: docs/mathematics.md (own), checked by tests/ops/test_grad_norm_objective.py.

    >>> grad_norm_objective(torch.tensor([[[4.0]]]), torch.tensor([[[3.0]]]), torch.tensor([[[2.0]]]))
    tensor([40.])
    """
    plus, minus = as_list(G_plus), as_list(G_minus)
    first = check_views("grad_norm_objective", plus, minus, ("G_plus", "G_minus"), joints)
    if g.dim() not in (3, 4):
        shape = (first.shape[0] * joints, first.shape[1], first.shape[1])
        raise ValueError(
            f"grad_norm_objective: g must be {shape} or (candidates, *{shape}), got {tuple(g.shape)}; "
            f"pass one (h, h) matrix per head"
        )
    # One candidate's shape, also where there is none.
    one = g if g.dim() == 3 else g.new_empty(()).expand(g.shape[1:])
    check_matrix("grad_norm_objective", "g", one, first, joints)
    candidates = g if g.dim() == 4 else g.unsqueeze(0)
    if direct((*plus, *minus, g)):
        J = _run(plus, minus, candidates, joints)
    else:
        J = torch.ops.teleport_fast.grad_norm_objective(plus, minus, candidates, joints)
    return J if g.dim() == 4 else J.squeeze(0)


def _grams(tensors: Sequence[Tensor], joints: int, g: Tensor) -> Tensor:
    """Σ G Gᵀ of every joint: (joints·heads, h, h), in g's dtype; zeros for an empty list."""
    sums = g.new_zeros(joints, g.shape[1] // joints, *g.shape[2:])
    parts = list(sums.unbind())
    for index, tensor in enumerate(tensors):
        joint = index * joints // len(tensors)
        G = tensor.flatten(2).to(g.dtype)
        parts[joint] = parts[joint] + G @ G.mT
    return torch.cat(parts)


def reference(plus: Sequence[Tensor], minus: Sequence[Tensor], g: Tensor, joints: int) -> Tensor:
    """The formula, in plain torch."""
    J = g.new_zeros(g.shape[:2])
    if minus:
        J = J + ((g @ _grams(minus, joints, g)) * g).sum((-1, -2))
    if plus:
        inverse, failed = torch.linalg.inv_ex(g)
        norm = ((inverse.mT @ _grams(plus, joints, g)) * inverse.mT).sum((-1, -2))
        J = J + torch.where(failed == 0, norm, float("inf"))
    return J


_OP = Op("grad_norm_objective", reference)


def _run(plus: Sequence[Tensor], minus: Sequence[Tensor], g: Tensor, joints: int) -> Tensor:
    tensors = (*plus, *minus)
    matrices = g.detach().to(accumulation_dtype(tensors[0].dtype)).contiguous()
    result: Tensor = _OP.choose(tensors, size=g.shape[-1])(plus, minus, matrices, joints)
    return result


@torch.library.custom_op(
    "teleport_fast::grad_norm_objective",
    mutates_args=(),
    schema="(Tensor[] plus, Tensor[] minus, Tensor g, int joints) -> Tensor",
)
def _op(plus: Sequence[Tensor], minus: Sequence[Tensor], g: Tensor, joints: int) -> Tensor:
    return _run(plus, minus, g, joints)


@_op.register_fake
def _(plus: Sequence[Tensor], minus: Sequence[Tensor], g: Tensor, joints: int) -> Tensor:
    return g.new_empty(g.shape[:2], dtype=accumulation_dtype((*plus, *minus)[0].dtype))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    plus, minus, g, ctx.joints = inputs
    ctx.split = len(plus)
    ctx.save_for_backward(*plus, *minus, g)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """dG₊ = 2 Σ J̄ P⁻¹ G₊, dG₋ = 2 Σ J̄ P G₋ over candidates, dg = 2 J̄ (g S₋ − g⁻ᵀ S₊ P⁻¹), as torch ops."""
    *tensors, g = ctx.saved_tensors
    plus, minus = tensors[: ctx.split], tensors[ctx.split :]
    matrix, weight = g.to(grad.dtype), 2 * grad[..., None, None]
    dg = torch.zeros_like(matrix)

    def run(tensors: Sequence[Tensor], metric: Tensor) -> list[Tensor]:
        metrics = (weight * metric).sum(0).unflatten(0, (ctx.joints, -1))
        grads = []
        for index, tensor in enumerate(tensors):
            G = tensor.flatten(2).to(metric.dtype)
            grads.append((metrics[index * ctx.joints // len(tensors)] @ G).reshape(tensor.shape).to(tensor.dtype))
        return grads

    plus_grads, minus_grads = [], []
    if minus:
        minus_grads = run(minus, matrix.mT @ matrix)
        dg = dg + weight * (matrix @ _grams(minus, ctx.joints, matrix))
    if plus:
        inverted = inverse(matrix)
        metric = inverted @ inverted.mT
        plus_grads = run(plus, metric)
        dg = dg - weight * (inverted.mT @ _grams(plus, ctx.joints, matrix) @ metric)
    return plus_grads, minus_grads, dg.to(g.dtype), None


_op.register_autograd(_backward, setup_context=_save)
