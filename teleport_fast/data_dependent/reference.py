"""The published algorithms, written for parity and as the baseline: double backward through every pseudo-inverse.

What the published code does differently from a symmetry is behind names: hidden inputs of the start (`stale`), I − T for the
inverse of I + T, total derivatives through the earlier pairs, hidden inputs that follow a step as h ← (I + T) h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teleport_fast.data_dependent.activation import Activation
from teleport_fast.data_dependent.losses import LossFunction

Weights = Sequence[Tensor]


def forward(weights: Weights, X: Tensor, activation: Activation) -> list[Tensor]:
    """Inputs of every layer and, last, the outputs: h₀ = X, h_{m+1} = σ(W_m h_m), no biases."""
    inputs = [X]
    for weight in weights[:-1]:
        inputs.append(activation.function(weight @ inputs[-1]))
    return [*inputs, weights[-1] @ inputs[-1]]


def act(
    weights: Weights,
    gs: Sequence[Tensor],
    inverses: Sequence[Tensor] | None,
    inputs: Sequence[Tensor],
    form: str,
    activation: Activation,
    keep_null_space: bool = False,
    stale: bool = False,
) -> list[Tensor]:
    """All pairs in turn, differentiable; `stale`: with the given inputs throughout, else recomputed after every pair."""
    moved, h, sigma = list(weights), inputs[0], activation.function
    for m, g in enumerate(gs):
        V, U = moved[m], moved[m + 1]
        Z = V @ h
        if form == "v_exact":
            H, H_new = sigma(Z), sigma(g @ Z)
            moved[m] = g @ V
            change = U @ H - U @ H_new if keep_null_space else U @ H
            moved[m + 1] = change @ torch.linalg.pinv(H_new) + (U if keep_null_space else 0)
        else:
            assert inverses is not None
            target = activation.inverse(g @ sigma(Z))
            change = target - Z if keep_null_space else target
            moved[m] = change @ torch.linalg.pinv(h) + (V if keep_null_space else 0)
            moved[m + 1] = U @ inverses[m]
        h = inputs[m + 1] if stale else sigma(moved[m] @ h)
    return moved


def lie_gradient(
    weights: Weights,
    X: Tensor,
    loss_fn: LossFunction,
    form: str,
    activation: Activation,
    keep_null_space: bool = True,
    total: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> tuple[float, float, list[Tensor]]:
    """(loss, J, dJ/dT by joint) at T = 0 by double backward; `total`: published, ∇L through the earlier pairs; `inputs`: stale ones."""
    with torch.enable_grad():
        Ts = [torch.zeros(len(W), len(W), dtype=W.dtype, device=W.device, requires_grad=True) for W in weights[:-1]]
        eyes = [torch.eye(len(T), dtype=T.dtype, device=T.device) for T in Ts]
        leaves = [W.detach().requires_grad_() for W in weights]
        moved = act(
            leaves,
            [eye + T for eye, T in zip(eyes, Ts, strict=True)],
            [eye - T for eye, T in zip(eyes, Ts, strict=True)],
            forward(leaves, X, activation) if inputs is None else inputs,
            form,
            activation,
            keep_null_space,
            stale=inputs is not None,
        )
        if not total:
            # Fresh nodes: each weight's gradient then leaves out its influence on the weights moved after it.
            moved = [W.clone() for W in moved]
        loss = loss_fn(forward(moved, X, activation)[-1])
        gradients = torch.autograd.grad(loss, moved, create_graph=True)
        J = torch.stack([G.square().sum() for G in gradients]).sum()
        return float(loss.detach()), float(J.detach()), list(torch.autograd.grad(J, Ts))


def published_teleport(
    weights: Weights,
    X: Tensor,
    loss_fn: LossFunction,
    code: str,
    activation: Activation,
    steps: int,
    lr: float,
    cap: float,
    ascend: bool,
    record: Callable[[float, float, list[Tensor]], None],
) -> tuple[list[Tensor], str]:
    """(weights, why it stopped) of the published loop: T = ±lr dJ/dT from T = 0 each step, cap looked at before the step.

    `code`: "iclr24" (V-exact, stale inputs), "neurips22" (U-exact, stale within a step), "l2t" (U-exact, recomputed).
    """
    form = "v_exact" if code == "iclr24" else "u_exact"
    moved = [W.detach() for W in weights]
    inputs = forward(moved, X, activation)[:-1]
    for _ in range(steps):
        kept = inputs if code == "iclr24" else None
        loss, J, gradient = lie_gradient(moved, X, loss_fn, form, activation, False, total=True, inputs=kept)
        if cap < J:
            record(loss, J, [])
            return moved, f"squared gradient norm {J:.3g} over the cap {cap:.3g}"
        Ts = [(lr if ascend else -lr) * T for T in gradient]
        record(loss, J, Ts)
        gs = [torch.eye(len(T), dtype=T.dtype, device=T.device) + T for T in Ts]
        inverses = [2 * torch.eye(len(g), dtype=g.dtype, device=g.device) - g for g in gs]
        with torch.no_grad():
            moved = act(moved, gs, inverses, inputs, form, activation, stale=code != "l2t")
            turned = [X, *(g @ h for g, h in zip(gs, inputs[1:], strict=True))]
            inputs = turned if code == "iclr24" else forward(moved, X, activation)[:-1]
    return moved, "all steps done"
