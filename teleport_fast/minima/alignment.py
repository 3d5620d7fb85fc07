"""Whether the gradient lies along an eigenvector of the Hessian: there no symmetry changes its norm to first order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.minima.point import Closure, check_graph, checked_loss, checked_parameters


@dataclass(frozen=True)
class Alignment:
    """`residual` ‖Hg − λg‖/‖Hg‖ (0: an eigenvector; at most 1), `curvature` λ = gᵀHg/gᵀg, `gradient_norm` ‖g‖, `loss`."""

    residual: float
    curvature: float
    gradient_norm: float
    loss: float


def hessian_alignment(loss_fn: Closure, params: Iterable[Tensor]) -> Alignment:
    """Alignment of the gradient with the Hessian at the present parameters, by one Hessian-vector product.

    Along a symmetry's v (tangent to the level set, gᵀv = 0) d‖g‖²/dt = 2(Hg − λg)ᵀv, so residual · 2‖Hg‖‖v‖ bounds it (own;
    [NeurIPS22], [ICLR24] section 3; tests/minima/test_alignment.py). Hg = 0 or g = 0 gives 0. ValueError for a loss without a graph.

    >>> w = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    >>> hessian_alignment(lambda: 3 * w[0] ** 2 + w[1] ** 2, [w])
    Alignment(residual=0.0, curvature=6.0, gradient_norm=6.0, loss=3.0)
    """
    tensors = checked_parameters(params)
    with torch.enable_grad():
        loss = checked_loss(loss_fn())
        check_graph(loss, tensors)
        gradients = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
        fixed = [g.detach() for g in gradients]
        curved = [(g, v) for g, v in zip(gradients, fixed, strict=True) if g.requires_grad]
        if curved:
            product = torch.autograd.grad([g for g, _ in curved], tensors, [v for _, v in curved], materialize_grads=True)
        else:
            product = tuple(torch.zeros_like(v) for v in fixed)
    g, Hg = (torch.cat([x.flatten().double() for x in parts]) for parts in (fixed, product))
    square, size = float(g @ g), float(torch.linalg.vector_norm(Hg))
    curvature = float(g @ Hg) / square if square > 0 else 0.0
    residual = float(torch.linalg.vector_norm(Hg - curvature * g)) / size if size > 0 else 0.0
    return Alignment(residual, curvature, square**0.5, float(loss.detach()))
