"""The gradient of any function of the weights, pulled back to the Lie algebra of the papers' action in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.data_dependent.moves import joint_factors


def lie_pullback(action: MLPAction, gradients: Sequence[Tensor]) -> list[Tensor]:
    """d f(exp(M)·w)/dM at M = 0, (h_m, h_m) by joint, from df/dW (out, in) by layer; needs keep_null_space=True.

    U-exact: −UᵀF_U + ((F_V h⁺ᵀ)/σ'(Z))σ(Z)ᵀ. V-exact: F_V Vᵀ − (σ'(Z) ⊙ (UᵀF_U H⁺ᵀ))Zᵀ, F = df/dW, H = σ(Z): the adjoints of
    γ' in `curve_derivatives` (own; tests/minima/test_teleport_to.py). ‖∇L‖² has F = 2H∇L, which is `MLPAction.lie_gradient`.

    >>> W = [torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    >>> action = MLPAction(W, torch.randn(5, 3, dtype=torch.float64))
    >>> [M.shape for M in lie_pullback(action, W)]
    [torch.Size([4, 4])]
    """
    if not action.keep_null_space or action.hidden != "recomputed":
        raise ValueError("action must have keep_null_space=True and hidden='recomputed': else the identity already moves the weights")
    net = action._network()
    found = []
    for m, inverse in enumerate(joint_factors(net, action._shared())):
        V, U, F_V = action.weights[m], net.reader(m), gradients[m]
        F_U = gradients[m + 1][:, :-1] if action.bias else gradients[m + 1]
        pulled = U.mT @ F_U
        if action.form == "u_exact":
            asked = inverse.right_transposed(F_V) / action.activation.derivative(net.Z[m])
            found.append(torch.addmm(-pulled, asked, net.hidden[m].mT))
        else:
            given = action.activation.pull(inverse.right_transposed(pulled), net.Z[m])
            found.append(torch.addmm(F_V @ V.mT, given, net.Z[m].mT, alpha=-1))
    return found
