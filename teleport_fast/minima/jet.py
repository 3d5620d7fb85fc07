"""A curve to second order: value, first and second derivative, with the few operations that an MLP's action needs."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_fast.data_dependent.activation import Activation
from teleport_fast.data_dependent.pseudo_inverse import PseudoInverse


class Jet:
    """x(0), x'(0), x''(0): value (k, n), derivatives (draws, k, n) or broadcasting to it.

    >>> t = Jet(torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[0.0]]))
    >>> (t @ t).second
    tensor([[2.]])
    """

    __slots__ = ("first", "second", "value")

    def __init__(self, value: Tensor, first: Tensor, second: Tensor) -> None:
        self.value, self.first, self.second = value, first, second

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


def turned(M: Tensor, H: Jet) -> Jet:
    """exp(tM) H: MH + H' and M(MH + 2H') + H''."""
    MH = M @ H.value
    return Jet(H.value, MH + H.first, M @ (MH + 2 * H.first) + H.second)


def turned_constant(M: Tensor, H: Tensor) -> Jet:
    """exp(tM) H of an H that stays: MH and M²H, in one product."""
    return Jet(H, *(torch.cat([M, M @ M], -2) @ H).tensor_split(2, -2))


def turned_back(U: Jet, M: Tensor) -> Jet:
    """U exp(−tM): U' − UM and U'' − (2U' − UM)M."""
    UM = U.value @ M
    return Jet(U.value, U.first - UM, U.second - (2 * U.first - UM) @ M)


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


def with_pseudo_inverse(A: Jet, h: Jet, inverse: PseudoInverse) -> Jet:
    """A h⁺ of A (m, n) and h (k, n) whose rank stays the same along the curve.

    P' = −P h' P + PPᵀ h'ᵀ(I − hP) + (I − Ph)h'ᵀ PᵀP (Golub and Pereyra, 1973), and its derivative, bracketed so that no (n, n)
    matrix is formed.
    """
    P, dP = inverse.dense(), _first(h, inverse)
    AP = A.value @ P
    first = A.first @ P + A.value @ dP
    second = A.second @ P + 2 * (A.first @ dP) + A.value @ _second(h, inverse, dP)
    return Jet(AP, first, second)


def from_zero_with_pseudo_inverse(A: Jet, h: Jet, inverse: PseudoInverse) -> Jet:
    """A h⁺ of an A that is 0 at the start: A'P and A''P + 2A'P', without P''."""
    n = A.first.shape[-2]
    both = torch.cat([A.first, A.second], -2)
    first, second = inverse.right(both).tensor_split([n], -2)
    return Jet(first.new_zeros(first.shape[-2:]), first, second + 2 * (A.first @ _first(h, inverse)))


def _first(h: Jet, inverse: PseudoInverse) -> Tensor:
    P, H, dH = inverse.dense(), h.value, h.first
    turn = (dH.mT @ P.mT) @ P
    first = turn - P @ (H @ turn) - P @ (dH @ P)
    if inverse.full_rows:
        return first
    return first + P @ (P.mT @ (dH.mT @ _rest(H, P)))


def _second(h: Jet, inverse: PseudoInverse, first: Tensor) -> Tensor:
    P, H, dH, ddH = inverse.dense(), h.value, h.first, h.second
    rest, W = _rest(H, P), P.mT @ P
    d_rest = -(dH @ P) - H @ first
    turn, d_turn = dH.mT @ W, ddH.mT @ W + dH.mT @ (first.mT @ P + P.mT @ first)
    return (
        -first @ (dH @ P) - P @ (ddH @ P) - P @ (dH @ first)
        + first @ (P.mT @ (dH.mT @ rest)) + P @ (first.mT @ (dH.mT @ rest))
        + P @ (P.mT @ (ddH.mT @ rest)) + P @ (P.mT @ (dH.mT @ d_rest))
        + d_turn - P @ (H @ d_turn) - first @ (H @ turn) - P @ (dH @ turn)
    )


def _rest(H: Tensor, P: Tensor) -> Tensor:
    """I − HP: the part of the space that the batch does not see."""
    return torch.eye(len(H), dtype=H.dtype, device=H.device) - H @ P
