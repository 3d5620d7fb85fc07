"""An MLP seen in activation space: gradients and one Hessian-vector product without touching the first weight again.

Own derivation (checked by tests/data_dependent/test_lie_gradient.py): the first layer's weight and input enter everything
that a teleport asks only through Z₀ = V₀X and Gram = XᵀX, because ‖E₀Xᵀ‖² = ⟨E₀ Gram, E₀⟩, the R-operator's first term is
G₀X = E₀ Gram, and K_{V₀}V₀ᵀ = RE₀ Z₀ᵀ. A step then costs nothing that grows with the input width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teleport_fast.data_dependent.activation import Activation
from teleport_fast.data_dependent.losses import OutputLoss


@dataclass
class Network:
    """Z₀ (k₀, B), the weights after the first, Gram = XᵀX (B, B) and σ; `bias`: inputs carry one more row of ones."""

    Z0: Tensor
    tail: list[Tensor]
    gram: Tensor
    activation: Activation
    bias: bool = False

    def __post_init__(self) -> None:
        self.forward()

    def forward(self) -> None:
        """Z and inputs of every layer from Z₀: Z[m] (k_m, B), inputs[m] (k_{m−1} + bias, B) for m ≥ 1; Z[-1] are the outputs."""
        self.Z = [self.Z0]
        self.hidden: list[Tensor] = []
        self.inputs: list[Tensor | None] = [None]
        for weight in self.tail:
            h = self.activation.function(self.Z[-1])
            self.hidden.append(h)
            wide = with_ones(h) if self.bias else h
            self.inputs.append(wide)
            self.Z.append(weight @ wide)

    @property
    def outputs(self) -> Tensor:
        """Y, (out, B)."""
        return self.Z[-1]

    def moved(self, Z0: Tensor, tail: list[Tensor]) -> Network:
        """The network after a move."""
        return replace(self, Z0=Z0, tail=tail)

    def reader(self, m: int) -> Tensor:
        """U of joint m without its bias column, (k_{m+1}, k_m): a view."""
        weight = self.tail[m]
        return weight[:, :-1] if self.bias else weight


@dataclass
class Backward:
    """One backward pass: E[m] = dL/dZ_m, G[m] = dL/dW_m for m ≥ 1, EG = E₀ Gram, loss, J = ‖∇L‖²."""

    loss: float
    E: list[Tensor]
    G: list[Tensor]
    EG: Tensor
    upstream: list[Tensor]
    slope: list[Tensor]
    J: float


def backward(net: Network, loss: OutputLoss) -> Backward:
    """Gradients in closed form: E_m = σ'(Z_m) ⊙ (W_{m+1}ᵀ E_{m+1}); J from E₀ Gram, so ∇W₀ is never formed."""
    value, E_out = loss.value_and_gradient(net.outputs)
    joints = len(net.tail)
    E = [E_out] * (joints + 1)
    G = [E_out] * (joints + 1)
    upstream = [E_out] * joints
    slope = [E_out] * joints
    J = 0.0
    for m in range(joints - 1, -1, -1):
        h = net.inputs[m + 1]
        assert h is not None
        G[m + 1] = E[m + 1] @ h.mT
        J += float(torch.linalg.vector_norm(G[m + 1])) ** 2
        upstream[m] = net.reader(m).mT @ E[m + 1]
        slope[m] = net.activation.derivative(net.Z[m])
        E[m] = slope[m] * upstream[m]
    EG = E[0] @ net.gram
    J += float(torch.dot(EG.flatten(), E[0].flatten()))
    return Backward(float(value), E, G, EG, upstream, slope, J)


@dataclass
class HessianProduct:
    """K = H∇L: RE[m] for every layer, K[m] for m ≥ 1 (K[0] is RE[0] Xᵀ and is not formed)."""

    RE: list[Tensor]
    K: list[Tensor]


def hessian_product(net: Network, back: Backward, loss: OutputLoss) -> HessianProduct:
    """Pearlmutter's R-operator along ∇L itself: RZ_m = G_m h_m + W_m Rh_m forward, then its transpose backward."""
    joints = len(net.tail)
    RZ = [back.EG]
    Rh: list[Tensor] = []
    for m in range(joints):
        Rh.append(back.slope[m] * RZ[m])
        h = net.inputs[m + 1]
        assert h is not None
        RZ.append(torch.addmm(back.G[m + 1] @ h, net.reader(m), Rh[m]))
    RE = [loss.hessian_product(RZ[-1])] * (joints + 1)
    K = [RE[-1]] * (joints + 1)
    second = net.activation.second_derivative
    for m in range(joints - 1, -1, -1):
        h, G = net.inputs[m + 1], back.G[m + 1]
        assert h is not None
        R = with_zeros(Rh[m]) if net.bias else Rh[m]
        K[m + 1] = torch.addmm(RE[m + 1] @ h.mT, back.E[m + 1], R.mT)
        below = torch.addmm((G[:, :-1] if net.bias else G).mT @ back.E[m + 1], net.reader(m).mT, RE[m + 1])
        RE[m] = back.slope[m] * below
        if second is not None:
            RE[m] = RE[m] + second(net.Z[m]) * RZ[m] * back.upstream[m]
    return HessianProduct(RE, K)


def with_ones(h: Tensor) -> Tensor:
    """h (k, B) with one more row of ones: the input that a bias reads."""
    return torch.cat([h, h.new_ones(1, h.shape[1])])


def with_zeros(h: Tensor) -> Tensor:
    """h (k, B) with one more row of zeros: the ones' derivative."""
    return torch.cat([h, h.new_zeros(1, h.shape[1])])
