"""An MLP seen in activation space: gradients and one Hessian-vector product without touching the first weight again.

Own derivation (checked by tests/data_dependent/test_lie_gradient.py): the first layer's weight and input enter everything
that a teleport asks only through Z₀ = V₀X and Gram = XᵀX, because ‖E₀Xᵀ‖² = ⟨E₀ Gram, E₀⟩, the R-operator's first term is
G₀X = E₀ Gram, and K_{V₀}V₀ᵀ = RE₀ Z₀ᵀ. A step then costs nothing that grows with the input width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from teleport_fast.data_dependent.activation import Activation
from teleport_fast.data_dependent.losses import OutputLoss


@dataclass
class Network:
    """Z₀ (k₀, B), the weights after the first, Gram = XᵀX (B, B), σ; `bias`: inputs carry a row of ones; `H0`: σ(Z₀) if at hand."""

    Z0: Tensor
    tail: list[Tensor]
    gram: Tensor
    activation: Activation
    bias: bool = False
    H0: Tensor | None = None

    def __post_init__(self) -> None:
        self.forward()

    def forward(self) -> None:
        """Z and inputs of every layer from Z₀: Z[m] (k_m, B), inputs[m] (k_{m−1} + bias, B) for m ≥ 1; Z[-1] are the outputs."""
        self.Z = [self.Z0]
        self.hidden: list[Tensor] = []
        self.inputs: list[Tensor | None] = [None]
        for weight in self.tail:
            known = self.H0 if len(self.Z) == 1 else None
            h = self.activation.function(self.Z[-1]) if known is None else known
            self.hidden.append(h)
            wide = with_ones(h) if self.bias else h
            self.inputs.append(wide)
            self.Z.append(torch.mm(weight, wide))

    @property
    def outputs(self) -> Tensor:
        """Y, (out, B)."""
        return self.Z[-1]

    def moved(self, Z0: Tensor, tail: list[Tensor], H0: Tensor | None = None) -> Network:
        """The network after a move."""
        return Network(Z0, tail, self.gram, self.activation, self.bias, H0)

    def reader(self, m: int) -> Tensor:
        """U of joint m without its bias column, (k_{m+1}, k_m): a view."""
        weight = self.tail[m]
        return weight[:, :-1] if self.bias else weight


@dataclass
class Backward:
    """One backward pass: E[m] = dL/dZ_m, G[m] = dL/dW_m for m ≥ 1, EG = E₀ Gram, the loss; scalars are read when asked for."""

    value: Tensor
    E: list[Tensor]
    G: list[Tensor]
    EG: Tensor
    upstream: list[Tensor]

    @cached_property
    def loss(self) -> float:
        """L."""
        return float(self.value)

    @cached_property
    def J(self) -> float:
        """‖∇L‖², the first layer's part as ⟨E₀ Gram, E₀⟩."""
        tail = sum(float(torch.linalg.vector_norm(G)) ** 2 for G in self.G[1:])
        return tail + float(torch.dot(self.EG.flatten(), self.E[0].flatten()))


def backward(net: Network, loss: OutputLoss) -> Backward:
    """Gradients in closed form: E_m = σ'(Z_m) ⊙ (W_{m+1}ᵀ E_{m+1}); J from E₀ Gram, so ∇W₀ is never formed."""
    value, E_out = loss.value_and_gradient(net.outputs)
    joints = len(net.tail)
    E = [E_out] * (joints + 1)
    G = [E_out] * (joints + 1)
    upstream = [E_out] * joints
    for m in range(joints - 1, -1, -1):
        h = net.inputs[m + 1]
        assert h is not None
        G[m + 1] = torch.mm(E[m + 1], h.t())
        upstream[m] = torch.mm(net.reader(m).t(), E[m + 1])
        E[m] = net.activation.pull(upstream[m], net.Z[m])
    return Backward(value, E, G, torch.mm(E[0], net.gram), upstream)


@dataclass
class HessianProduct:
    """K = H∇L: RE[m] for every layer, K[m] for m ≥ 1 (K[0] is RE[0] Xᵀ and is not formed; RE[0] only with `first`)."""

    RE: list[Tensor]
    K: list[Tensor]


def hessian_product(net: Network, back: Backward, loss: OutputLoss, first: bool = True) -> HessianProduct:
    """Pearlmutter's R-operator along ∇L itself: RZ_m = G_m h_m + W_m Rh_m forward, then its transpose backward."""
    joints = len(net.tail)
    RZ = [back.EG]
    Rh: list[Tensor] = []
    for m in range(joints):
        Rh.append(net.activation.pull(RZ[m], net.Z[m]))
        h = net.inputs[m + 1]
        assert h is not None
        RZ.append(torch.addmm(torch.mm(back.G[m + 1], h), net.reader(m), Rh[m]))
    RE = [loss.hessian_product(RZ[-1])] * (joints + 1)
    K = [RE[-1]] * (joints + 1)
    for m in range(joints - 1, -1, -1):
        h = net.inputs[m + 1]
        assert h is not None
        R = with_zeros(Rh[m]) if net.bias else Rh[m]
        K[m + 1] = torch.addmm(torch.mm(RE[m + 1], h.t()), back.E[m + 1], R.t())
        if m or first:
            RE[m] = pulled_back(net, back, m, RZ[m], RE[m + 1])
    return HessianProduct(RE, K)


def pulled_back(net: Network, back: Backward, m: int, RZ: Tensor, above: Tensor) -> Tensor:
    """R(E_m) = σ'(Z_m) ⊙ (G_{m+1}ᵀ E_{m+1} + Uᵀ above) + σ''(Z_m) ⊙ RZ_m ⊙ UᵀE_{m+1}, (k_m, B); above is R(E_{m+1})."""
    G, second = back.G[m + 1], net.activation.second_derivative
    below = torch.addmm(torch.mm((G[:, :-1] if net.bias else G).t(), back.E[m + 1]), net.reader(m).t(), above)
    pulled = net.activation.pull(below, net.Z[m])
    return pulled if second is None else pulled.addcmul_(second(net.Z[m]) * RZ, back.upstream[m])


def with_ones(h: Tensor) -> Tensor:
    """h (k, B) with one more row of ones: the input that a bias reads."""
    return torch.cat([h, h.new_ones(1, h.shape[1])])


def with_zeros(h: Tensor) -> Tensor:
    """h (k, B) with one more row of zeros: the ones' derivative."""
    return torch.cat([h, h.new_zeros(1, h.shape[1])])
