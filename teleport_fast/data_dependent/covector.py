"""How a covector at the weights, such as momentum, moves with a data-dependent move Φ: p' = (DΦ)⁻ᵀ p (own derivation).

Φ is the move as a function of all weights, g fixed. Its inverse undoes the pairs from the last to the first, each with the hidden
inputs of the moved weights: U-exact by g⁻¹, V-exact by U R⁻¹ with R = I + (σ(Z) − σ(gZ))σ(gZ)⁺. p' is that inverse's
vector-Jacobian product with p, so ⟨p', DΦ δ⟩ = ⟨p, δ⟩ for every direction δ, and p = ∇L goes to ∇L(Φ(w)) where the move is exact
(tests/data_dependent/test_state.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.data_dependent.network import with_ones


def push_covectors(action: MLPAction, gs: Sequence[Tensor], moved: Sequence[Tensor], covectors: Sequence[Tensor]) -> list[Tensor]:
    """Covectors at action.weights, of the weights' shapes or n of each, (n, out, in), carried to `moved` = action.apply(gs).

    Computed in float64 and returned in the covectors' dtype.

    ValueError where the move has no inverse: U-exact on a batch beyond the rank of its inputs, or no null space kept.

    >>> action = MLPAction([torch.randn(4, 5).double(), torch.randn(2, 4).double()], torch.randn(5, 3).double())
    >>> gs = [2 * torch.eye(4).double()]
    >>> p = [torch.ones(4, 5).double(), torch.ones(2, 4).double()]
    >>> torch.equal(push_covectors(action, gs, action.apply(gs), p)[1], 2 * p[1])
    True
    """
    if not action.keep_null_space:
        raise ValueError("momentum cannot be carried with keep_null_space=False, which forgets a part of the weights; reset the state")
    with torch.enable_grad():
        leaves = [weight.detach().double().requires_grad_() for weight in moved]
        before = undo(action, [g.detach().double() for g in gs], leaves)
        several = covectors[0].dim() == 3
        carried = torch.autograd.grad(before, leaves, [p.detach().double() for p in covectors], is_grads_batched=several)
    return [new.to(old.dtype) for new, old in zip(carried, covectors, strict=True)]


def undo(action: MLPAction, gs: Sequence[Tensor], moved: Sequence[Tensor]) -> list[Tensor]:
    """Φ⁻¹ of moved weights, differentiable: the weights that action.apply(gs) moved there."""
    weights, X, sigma = list(moved), action.X.double(), action.activation
    inputs = [with_ones(X) if action.bias else X]
    for weight in weights[:-1]:
        h = sigma.function(weight @ inputs[-1])
        inputs.append(with_ones(h) if action.bias else h)
    for m in reversed(range(len(gs))):
        h, V = inputs[m], weights[m]
        U = weights[m + 1][:, :-1] if action.bias else weights[m + 1]
        Z = V @ h
        H, g = sigma.function(Z), gs[m]
        if action.form == "v_exact":
            weights[m] = torch.linalg.solve(g, V)
            old = sigma.function(weights[m] @ h)
            R = torch.eye(len(g), dtype=g.dtype, device=g.device) + (old - H) @ torch.linalg.pinv(H)
            U = torch.linalg.solve(R, U, left=False)
        else:
            if int(torch.linalg.matrix_rank(h.detach())) < h.shape[1]:
                raise ValueError(
                    f"momentum cannot be carried: the batch of {h.shape[1]} exceeds the rank of layer {m}'s inputs {tuple(h.shape)}; "
                    "take a smaller batch, form='v_exact', or reset the state"
                )
            target = sigma.inverse(torch.linalg.solve(g, H))
            weights[m] = V + (target - Z) @ torch.linalg.pinv(h)
            U = U @ g
        weights[m + 1] = torch.cat([U, weights[m + 1][:, -1:]], 1) if action.bias else U
    return weights
