"""A curve to second order: value, first and second derivative, with the few operations that an MLP's action needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.data_dependent.activation import Activation
from teleport_fast.data_dependent.pseudo_inverse import PseudoInverse


@dataclass(frozen=True)
class Jet:
    """x(0), x'(0), x''(0): value (k, n), derivatives (draws, k, n) or broadcasting to it.

    >>> t = Jet(torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[0.0]]))
    >>> (t @ t).second
    tensor([[2.]])
    """

    value: Tensor
    first: Tensor
    second: Tensor

    def __matmul__(self, other: Jet) -> Jet:
        """Leibniz: (ab)'' = a''b + 2a'b' + ab''."""
        return Jet(
            self.value @ other.value,
            self.first @ other.value + self.value @ other.first,
            self.second @ other.value + 2 * (self.first @ other.first) + self.value @ other.second,
        )

    def __add__(self, other: Jet) -> Jet:
        return Jet(self.value + other.value, self.first + other.first, self.second + other.second)

    def __sub__(self, other: Jet) -> Jet:
        return Jet(self.value - other.value, self.first - other.first, self.second - other.second)

    def right(self, constant: Tensor) -> Jet:
        """x C with a constant C."""
        return Jet(self.value @ constant, self.first @ constant, self.second @ constant)

    def left(self, constant: Tensor) -> Jet:
        """C x with a constant C."""
        return Jet(constant @ self.value, constant @ self.first, constant @ self.second)

    def with_row(self, value: float) -> Jet:
        """One more row that stays at `value`: the input that a bias reads."""
        rows = [torch.nn.functional.pad(x, (0, 0, 0, 1), value=v)
                for x, v in ((self.value, value), (self.first, 0.0), (self.second, 0.0))]
        return Jet(*rows)


def constant(value: Tensor) -> Jet:
    """A curve that stays where it is."""
    zero = torch.zeros_like(value)
    return Jet(value, zero, zero)


def exponential(M: Tensor, sign: float = 1.0) -> Jet:
    """exp(± t M): I, ±M, M²."""
    return Jet(torch.eye(M.shape[-1], dtype=M.dtype, device=M.device), sign * M, M @ M)


def activated(Z: Jet, activation: Activation) -> Jet:
    """σ(Z): σ'Z' and σ''Z'² + σ'Z''."""
    slope = activation.derivative(Z.value)
    second = slope * Z.second
    if activation.second_derivative is not None:
        second = second + activation.second_derivative(Z.value) * Z.first.square()
    return Jet(activation.function(Z.value), slope * Z.first, second)


def deactivated(H: Jet, Z: Tensor, activation: Activation) -> Jet:
    """y = σ⁻¹(H) where H starts at σ(Z): y' = H'/σ'(Z), y'' = (H'' − σ''(Z) y'²)/σ'(Z)."""
    slope = activation.derivative(Z)
    first = H.first / slope
    second = H.second
    if activation.second_derivative is not None:
        second = second - activation.second_derivative(Z) * first.square()
    return Jet(Z, first, second / slope)


def pseudo_inverse(h: Jet, inverse: PseudoInverse) -> Jet:
    """h⁺ (n, k) of h (k, n) whose rank stays the same along the curve (Golub and Pereyra, 1973), differentiated once more.

    P' = −P h' P + PPᵀ h'ᵀ(I − hP) + (I − Ph)h'ᵀ PᵀP, bracketed so that no (n, n) matrix is formed.
    """
    P, H, dH, ddH = inverse.dense(), h.value, h.first, h.second
    rest = torch.eye(len(H), dtype=H.dtype, device=H.device) - H @ P
    W = P.mT @ P

    def outside(A: Tensor) -> Tensor:
        return A - P @ (H @ A)

    first = -P @ (dH @ P) + P @ (P.mT @ (dH.mT @ rest)) + outside(dH.mT @ W)
    d_rest = -(dH @ P) - H @ first
    dW = first.mT @ P + P.mT @ first
    second = (
        -first @ (dH @ P) - P @ (ddH @ P) - P @ (dH @ first)
        + first @ (P.mT @ (dH.mT @ rest)) + P @ (first.mT @ (dH.mT @ rest))
        + P @ (P.mT @ (ddH.mT @ rest)) + P @ (P.mT @ (dH.mT @ d_rest))
        + outside(ddH.mT @ W) + outside(dH.mT @ dW) - first @ (H @ (dH.mT @ W)) - P @ (dH @ (dH.mT @ W))
    )
    return Jet(P, first, second)
