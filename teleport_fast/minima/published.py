"""The published loops that change sharpness and curvature, for parity: what `teleport_to` does differently is named here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.data_dependent import reference
from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.data_dependent.ascent import identity_plus
from teleport_fast.data_dependent.losses import LossFunction
from teleport_fast.minima.curve_autograd import curvature_at, lie_curve


@dataclass(frozen=True)
class PublishedTrace:
    """`weights` after the loop; by step, the measure before it and T by joint (curvature: t, the length along M)."""

    weights: list[Tensor]
    values: list[float]
    moves: list[list[Tensor]]


def published_sharpness(
    action: MLPAction,
    loss_fn: LossFunction,
    lr: float,
    directions: Tensor,
    radii: Sequence[float],
    ascend: bool = True,
    cap: float = 2.0,
) -> PublishedTrace:
    """T = ± lr dφ/dT from T = 0 each step; directions (steps, radii, n, P) of unit norm, new ones each step, of the positive orthant.

    As published [ICLR24 code]: V-exact without the null space, inputs h ← (I + T)h after a step and of the start before, so that
    the loss moves; derivatives through the earlier pairs; φ divides nine radii's sum by ten; no search, and a cap on φ before
    the step only. ValueError for another form, and for biases.

    >>> W = [torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    >>> action = MLPAction(W, torch.randn(5, 3, dtype=torch.float64), form="v_exact")
    >>> d = torch.nn.functional.normalize(torch.rand(2, 1, 4, 28, dtype=torch.float64), dim=-1)
    >>> len(published_sharpness(action, lambda Y: Y.square().mean(), 0.05, d, [0.1]).values)
    2
    """
    _check(action, lr)
    sigma, X = action.activation, action.X
    weights, inputs = list(action.weights), reference.forward(action.weights, X, sigma)[:-1]
    values: list[float] = []
    moves: list[list[Tensor]] = []
    for draws in directions:
        with torch.enable_grad():
            Ts = [torch.zeros(k, k, dtype=X.dtype, requires_grad=True) for k in action.widths]
            moved = reference.act(weights, [identity_plus(T) for T in Ts], None, inputs, "v_exact", sigma, stale=True)
            total = X.new_zeros(())
            for t, stack in zip(radii, draws, strict=True):
                parts = stack.to(X).split([W.numel() for W in moved], 1)
                around = [W + t * part.reshape(-1, *W.shape) for W, part in zip(moved, parts, strict=True)]
                total = total + torch.stack([loss_fn(Y) for Y in reference.forward(around, X, sigma)[-1]]).mean()
            value = total / 10
        values.append(float(value.detach()))
        if values[-1] > cap:
            break
        gradients = torch.autograd.grad(value, Ts)
        moves.append([(lr if ascend else -lr) * gradient for gradient in gradients])
        gs = [identity_plus(T) for T in moves[-1]]
        weights = reference.act(weights, gs, None, inputs, "v_exact", sigma, stale=True)
        inputs = [X, *(g @ h for g, h in zip(gs, inputs[1:], strict=True))]
    return PublishedTrace(weights, values, moves)


def published_curvature(
    action: MLPAction, lr: float, Ms: Sequence[Tensor], ascend: bool = True, joint: int = 1
) -> PublishedTrace:
    """Along one new M a step, in one joint only: t = ± lr dκ/dt at 0, then exp(tM); Ms (h, h), one a step.

    As published [ICLR24 code]: V-exact without the null space, the second joint. Every step's κ is along its own M, so the
    values are no trend. ValueError for another form, biases, and a joint that is not there.

    >>> W = [torch.randn(k, n, dtype=torch.float64) for n, k in ((5, 4), (4, 4), (4, 2))]
    >>> action = MLPAction(W, torch.randn(5, 3, dtype=torch.float64), form="v_exact")
    >>> len(published_curvature(action, 0.01, torch.rand(3, 4, 4)).values)
    3
    """
    _check(action, lr)
    if not 0 <= joint < len(action.widths):
        raise ValueError(f"joint must be in 0..{len(action.widths) - 1}, got {joint}; the published code moves the second")
    weights = list(action.weights)
    values: list[float] = []
    moves: list[list[Tensor]] = []
    for M in Ms:
        h = reference.forward(weights, action.X, action.activation)[joint]
        pair = MLPAction(weights[joint : joint + 2], h, form="v_exact", activation=action.activation, keep_null_space=False)
        zero = torch.zeros((), dtype=h.dtype)
        curve = lie_curve(pair, [M])
        found = torch.func.jvp(lambda t: curvature_at(curve, t), (zero,), (torch.ones_like(zero),))  # noqa: B023
        t = (lr if ascend else -lr) * found[1]
        values.append(float(found[0]))
        moves.append([t])
        weights[joint : joint + 2] = [W.detach() for W in curve(t)]
    return PublishedTrace(weights, values, moves)


def _check(action: MLPAction, lr: float) -> None:
    if action.form != "v_exact" or action.bias:
        raise ValueError(f"action must be v_exact without biases, as published, got form={action.form!r} and bias={action.bias}; "
                         "teleport_to takes both")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}; ascend=False goes down")
