"""One move of all joints in activation space, in the U-exact and the V-exact form, hidden inputs recomputed after every pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teleport_fast.data_dependent.network import Backward, HessianProduct, Network, with_ones
from teleport_fast.data_dependent.pseudo_inverse import PseudoInverse, factor


@dataclass
class Frame:
    """What a sequence of moves shares: the form, X⁺ and its projector X⁺X, and which part of the weights is kept."""

    form: str
    keep_null_space: bool
    X: Tensor
    X_inverse: PseudoInverse | None

    def project(self, A: Tensor) -> Tensor:
        """A X⁺X: what the first layer can give for the targets A (k, B)."""
        assert self.X_inverse is not None
        if self.X_inverse.full_columns:
            return A
        if not hasattr(self, "_projector"):
            self._projector = self.X_inverse.dense() @ self.X
        return A @ self._projector


@dataclass
class Moved:
    """The network after the move, the factored matrices by joint, and V-exact's factor of the first weight."""

    net: Network
    factors: list[PseudoInverse] = field(default_factory=list)
    lead: Tensor | None = None


def exponentials(Ts: Sequence[Tensor], form: str) -> tuple[list[Tensor], list[Tensor] | None]:
    """exp(T) of every joint, and exp(−T), which the U-exact form needs beside it."""
    gs = [torch.linalg.matrix_exp(T) for T in Ts]
    return gs, [torch.linalg.matrix_exp(-T) for T in Ts] if form == "u_exact" else None


def move_if_finite(net: Network, gs: Sequence[Tensor], inverses: Sequence[Tensor] | None, frame: Frame) -> Moved | None:
    """`move`; None where an element is not finite or nothing can be factored on the way. What it moved may still be."""
    if not all(bool(torch.isfinite(g).all()) for g in [*gs, *(inverses or [])]):
        return None
    try:
        return move(net, gs, inverses, frame)
    except torch.linalg.LinAlgError:
        return None


def move(
    net: Network,
    gs: Sequence[Tensor],
    inverses: Sequence[Tensor] | None,
    frame: Frame,
    stale: Sequence[Tensor] | None = None,
) -> Moved:
    """U-exact: V += (σ⁻¹(gσ(Z)) − Z)h⁺, U g⁻¹. V-exact: gV, U += (Uσ(Z) − Uσ(gZ))σ(gZ)⁺. `stale`: hidden inputs to use instead."""
    sigma, tail = net.activation, list(net.tail)
    Z0 = net.Z0
    h: Tensor | None = None
    factors: list[PseudoInverse] = []
    for m, g in enumerate(gs):
        Z = net.Z0 if h is None else tail[m - 1] @ h
        H = sigma.function(Z)
        U = tail[m][:, :-1] if net.bias else tail[m]
        if frame.form == "v_exact":
            Z_new = g @ Z
            if m:
                tail[m - 1] = g @ tail[m - 1]
            H_new = sigma.function(Z_new)
            inverse = factor(H_new)
            change = U @ (H - H_new) if frame.keep_null_space else U @ H
            U_new = inverse.right(change)
            if frame.keep_null_space:
                U_new = U_new + U
        else:
            assert inverses is not None
            target = sigma.inverse(g @ H)
            change = target - Z if frame.keep_null_space else target
            if h is None:
                assert frame.X_inverse is not None
                inverse, Z_new = frame.X_inverse, frame.project(change)
                if frame.keep_null_space:
                    Z_new = Z_new + Z
            else:
                inverse = factor(h)
                weight = inverse.right(change)
                tail[m - 1] = tail[m - 1] + weight if frame.keep_null_space else weight
                Z_new = tail[m - 1] @ h
            U_new = U @ inverses[m]
            H_new = sigma.function(Z_new)
        tail[m] = torch.cat([U_new, tail[m][:, -1:]], 1) if net.bias else U_new
        if m == 0:
            Z0 = Z_new
        factors.append(inverse)
        recomputed = with_ones(H_new) if net.bias else H_new
        h = recomputed if stale is None else stale[m]
    return Moved(net.moved(Z0, tail), factors, gs[0] if frame.form == "v_exact" else None)


def joint_factors(net: Network, frame: Frame) -> list[PseudoInverse]:
    """The matrices that the Lie-algebra gradient divides by: hidden outputs σ(Z_m) (V-exact), inputs h_m (U-exact)."""
    if frame.form == "v_exact":
        return [factor(h) for h in net.hidden]
    assert frame.X_inverse is not None
    return [frame.X_inverse, *(factor(h) for h in net.inputs[1:-1] if h is not None)]


def lie_gradient(
    net: Network,
    back: Backward,
    product: HessianProduct,
    frame: Frame,
    factors: Sequence[PseudoInverse],
) -> list[Tensor]:
    """dJ/dM (k_m, k_m) by joint from K = H∇L; U-exact 2[−UᵀK_U + ((K_V h⁺ᵀ)/σ')σ(Z)ᵀ], V-exact 2[K_V Vᵀ − (σ' ⊙ (UᵀK_U H⁺ᵀ))Zᵀ]."""
    gradients = []
    for m, inverse in enumerate(factors):
        U = net.reader(m)
        K_U = product.K[m + 1][:, :-1] if net.bias else product.K[m + 1]
        if frame.form == "u_exact":
            K_h = frame.project(product.RE[0]) if m == 0 else inverse.right_transposed(product.K[m])
            gradients.append(2 * torch.addmm((K_h / net.activation.derivative(net.Z[m])) @ net.hidden[m].mT, U.mT, K_U, alpha=-1))
            continue
        Z = net.Z[m]
        K_V = product.RE[0] @ net.Z0.mT if m == 0 else product.K[m] @ net.tail[m - 1].mT
        B = U.mT @ K_U
        if not frame.keep_null_space and not inverse.full_rows:
            # U is U HH⁺ there, and HH⁺ turns with H: d(H⁺) has the part H⁺H⁺ᵀdHᵀ(I − HH⁺).
            H = net.activation.function(Z)
            assert inverse.second is not None
            B = B - (B.mT - H @ (inverse.first @ (inverse.second @ B.mT)))
        gradients.append(2 * torch.addmm(K_V, net.activation.pull(inverse.right_transposed(B), Z), Z.mT, alpha=-1))
    return gradients
