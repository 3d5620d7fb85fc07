"""The curvature of any differentiable curve of weights by forward differentiation twice, and the action's curve as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teleport_fast.data_dependent import reference
from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.minima.curvature_mean import curvature_of
from teleport_fast.minima.lie_curve import check_generators

Curve = Callable[[Tensor], tuple[Tensor, ...]]


def lie_curve(action: MLPAction, Ms: Sequence[Tensor]) -> Curve:
    """t (scalar tensor) -> the weights exp(tM)·w, differentiable in t; Ms[m] (h_m, h_m). ValueError for biases: use `curvature`.

    >>> W = [torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    >>> action = MLPAction(W, torch.randn(5, 3, dtype=torch.float64))
    >>> curve = lie_curve(action, [torch.eye(4, dtype=torch.float64)])
    >>> torch.allclose(curve(torch.tensor(1.0, dtype=torch.float64))[1], W[1] / torch.e)
    True
    """
    generators = check_generators(action, Ms)
    if generators[0].dim() == 3:
        raise ValueError(f"Ms must be without draws here, got {tuple(Ms[0].shape)}; pass one M per hidden layer")
    if action.bias:
        raise ValueError("action must be without biases, got bias=True; use teleport_fast.curvature, which has them")
    inputs = reference.forward(action.weights, action.X, action.activation)

    def curve(t: Tensor) -> tuple[Tensor, ...]:
        gs = [torch.linalg.matrix_exp(t * M) for M in generators]
        inverses = [torch.linalg.matrix_exp(-t * M) for M in generators]
        return tuple(reference.act(
            action.weights, gs, inverses, inputs, action.form, action.activation, action.keep_null_space
        ))

    return curve


def curvature_at(curve: Curve, t: Tensor) -> Tensor:
    """κ at t of a curve t -> tensors, by a forward derivative of a forward derivative; differentiable in t itself.

    >>> circle = lambda t: (torch.stack([2 * t.cos(), 2 * t.sin()]).unsqueeze(0),)
    >>> curvature_at(circle, torch.tensor(0.3))
    tensor(0.5000)
    """

    def velocity(s: Tensor) -> tuple[Tensor, ...]:
        moving: tuple[Tensor, ...] = torch.func.jvp(curve, (s,), (torch.ones_like(s),))[1]
        return moving

    derivatives = torch.func.jvp(velocity, (t,), (torch.ones_like(t),))
    return curvature_of(derivatives[0], derivatives[1])
