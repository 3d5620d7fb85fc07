"""Invertible activations: σ with its inverse and derivatives, proven on a grid before anything is moved with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

Pointwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """σ, σ⁻¹, σ', σ'' (None: σ'' is 0 almost everywhere), each a Tensor -> Tensor of equal shape; ValueError unless invertible.

    `slope`: LeakyReLU's, None for all others.

    >>> leaky_relu(0.1).inverse(torch.tensor([-0.1, 2.0]))
    tensor([-1.,  2.])
    """

    name: str
    function: Pointwise
    inverse: Pointwise
    derivative: Pointwise
    second_derivative: Pointwise | None = None
    fused_pull: Callable[[Tensor, Tensor], Tensor] | None = None
    slope: float | None = None

    def pull(self, G: Tensor, Z: Tensor) -> Tensor:
        """G ⊙ σ'(Z), in one call where the activation has one.

        >>> leaky_relu(0.5).pull(torch.tensor([3.0, 3.0]), torch.tensor([-1.0, 1.0]))
        tensor([1.5000, 3.0000])
        """
        return G * self.derivative(Z) if self.fused_pull is None else self.fused_pull(G, Z)

    def __post_init__(self) -> None:
        grid = torch.linspace(-4, 4, 97, dtype=torch.float64)
        with torch.no_grad():
            error = (self.inverse(self.function(grid)) - grid).abs().max()
            slope = self.derivative(grid)
        step = 1e-6
        off_kink = grid.abs() > step
        difference = (self.function(grid + step) - self.function(grid - step)) / (2 * step)
        if not error <= 1e-8:
            raise ValueError(f"{self.name} is not invertible: |inverse(function(z)) - z| reaches {float(error):.1e} on "
                             "[-4, 4]; pass an activation whose inverse holds there, like leaky_relu(0.1)")
        if not bool((slope.abs() > 0).all()):
            raise ValueError(f"{self.name} is not invertible: its derivative is 0 on [-4, 4]; pass one without flat parts")
        wrong = (slope - difference).abs()[off_kink].max()
        if not wrong <= 1e-6:
            raise ValueError(f"the derivative of {self.name} is off by {float(wrong):.1e} on [-4, 4]; pass the derivative of function")


def leaky_relu(negative_slope: float = 0.1) -> Activation:
    """z where z > 0, else negative_slope * z; ValueError where the slope is not positive (ReLU is not invertible).

    >>> leaky_relu(0.1).name
    'leaky_relu(0.1)'
    """
    slope = float(negative_slope)
    if not 0 < slope < float("inf"):
        raise ValueError(f"negative_slope must be positive, got {slope}; ReLU (slope 0) is not invertible, pass for example 0.1")
    return _leaky_relu(slope)


@lru_cache(maxsize=8)
def _leaky_relu(slope: float) -> Activation:
    # The overload itself: resolving it by name costs as much as the kernel on (16, 200).
    backward = torch.ops.aten.leaky_relu_backward.default
    return Activation(
        f"leaky_relu({slope:g})",
        lambda z: nn.functional.leaky_relu(z, slope),
        lambda z: nn.functional.leaky_relu(z, 1 / slope),
        lambda z: backward(torch.ones_like(z), z, slope, False),
        fused_pull=lambda G, z: backward(G, z, slope, False),
        slope=slope,
    )


def activation_of(module: nn.Module) -> Activation:
    """The Activation of a torch module (LeakyReLU, PReLU with one slope, Softplus excluded: its range is half a line).

    >>> activation_of(torch.nn.LeakyReLU(0.2)).name
    'leaky_relu(0.2)'
    """
    if isinstance(module, nn.LeakyReLU):
        return leaky_relu(module.negative_slope)
    if isinstance(module, nn.PReLU):
        if module.weight.numel() != 1:
            raise ValueError(f"PReLU must have one slope, got {module.weight.numel()}; pass PReLU(1)")
        return leaky_relu(float(module.weight.detach()))
    raise ValueError(f"{type(module).__name__} has no known inverse; pass activation=Activation(name, function, inverse, derivative)")
