"""What a teleport to another minimum changes: a measure of the weights with its gradient in them, on draws that stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from teleport_fast.data_dependent.action import MLPAction, at
from teleport_fast.data_dependent.losses import CrossEntropy, LossFunction, OutputLoss, SquaredError, output_loss
from teleport_fast.data_dependent.network import with_ones
from teleport_fast.minima.curvature_mean import curvature_of, random_generators
from teleport_fast.minima.directions import sphere_directions
from teleport_fast.minima.lie_curve import check_generators, curve_of, turning_factor
from teleport_fast.minima.sharpness_mean import check_direction

RADII = tuple(k / 10 for k in range(1, 10))  # the published ones [ICLR24]
ENTRIES = 2**21  # of perturbed weights held at once


class Measure(Protocol):
    """A number of an action's weights; `gradient` gives the number and its derivative by every weight."""

    name: str

    def value(self, action: MLPAction) -> float: ...

    def gradient(self, action: MLPAction) -> tuple[float, list[Tensor]]: ...


class MeanSharpness:
    """φ(w) = mean of L(w + t d) over radii t and unit directions d [ICLR24]; directions (n, P) or (radii, n, P), P all weight entries.

    Equal to `sharpness` on the same directions; the gradient is one batched backward pass by hand, no graph is kept.
    ValueError for radii that are not positive, directions of another size or not of unit norm.

    >>> W = [torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    >>> action = MLPAction(W, torch.randn(5, 3, dtype=torch.float64))
    >>> measure = MeanSharpness.drawn(action, lambda Y: Y.square().mean(), count=8)
    >>> measure.gradient(action)[0] == measure.value(action)
    True
    """

    name = "sharpness"

    def __init__(self, loss_fn: LossFunction, radii: Sequence[float] | Tensor, directions: Tensor) -> None:
        self.loss, self.radii = output_loss(loss_fn), [float(t) for t in radii]
        if not self.radii or not all(0 < t < float("inf") for t in self.radii):
            raise ValueError(f"radii must be positive and finite, got {self.radii}; pass for example [0.1, 0.2]")
        if directions.dim() not in (2, 3) or (directions.dim() == 3 and len(directions) != len(self.radii)) or 0 in directions.shape:
            raise ValueError(f"directions must be (n, P) or ({len(self.radii)}, n, P), got {tuple(directions.shape)}; "
                             "see MeanSharpness.drawn")
        for d in directions.reshape(-1, directions.shape[-1]):
            check_direction(d, directions.shape[-1])
        self.directions = directions

    @classmethod
    def drawn(
        cls,
        action: MLPAction,
        loss_fn: LossFunction,
        radii: Sequence[float] = RADII,
        count: int = 64,
        generator: torch.Generator | None = None,
    ) -> MeanSharpness:
        """`count` directions of the sphere in pairs d, −d, which leave the slope of L at w out of the mean.

        >>> W = [torch.zeros(4, 5), torch.zeros(2, 4)]
        >>> MeanSharpness.drawn(MLPAction(W, torch.zeros(5, 3)), torch.sum, count=6).directions.shape
        torch.Size([6, 28])
        """
        if count < 2 or count % 2:
            raise ValueError(f"count must be even and at least 2, got {count}; directions come in pairs d, -d")
        half = torch.stack(list(sphere_directions(action.weights, count // 2, generator)))
        return cls(loss_fn, radii, torch.cat([half, -half]))

    def value(self, action: MLPAction) -> float:
        """φ at the action's weights."""
        total = 0.0
        for weights in self._perturbed(action):
            total += float(_losses(self.loss, _forward(action, weights)[1][-1])[0])
        return total / self._count()

    def gradient(self, action: MLPAction) -> tuple[float, list[Tensor]]:
        """(φ, dφ/dW by layer)."""
        total, sums = 0.0, [torch.zeros_like(W) for W in action.weights]
        for weights in self._perturbed(action):
            inputs, Z = _forward(action, weights)
            value, E = _losses(self.loss, Z[-1])
            total += float(value)
            for m in range(len(weights) - 1, -1, -1):
                sums[m] += torch.einsum("nab,ncb->ac", E, inputs[m]) if inputs[m].dim() == 3 else E.sum(0) @ inputs[m].mT
                if m:
                    reader = weights[m][..., :-1] if action.bias else weights[m]
                    E = action.activation.pull(reader.mT @ E, Z[m - 1])
        return total / self._count(), [G / self._count() for G in sums]

    def _count(self) -> int:
        return self.directions.shape[-2] * len(self.radii)

    def _perturbed(self, action: MLPAction) -> Iterator[list[Tensor]]:
        """Weights (n, out, in) of a chunk of perturbed networks after another."""
        sizes = [W.numel() for W in action.weights]
        check_direction(self.directions.reshape(-1, self.directions.shape[-1])[0], sum(sizes))
        for index, t in enumerate(self.radii):
            stack = self.directions[index] if self.directions.dim() == 3 else self.directions
            for chunk in stack.to(action.X).split(max(1, ENTRIES // sum(sizes))):
                yield [W + t * part.reshape(-1, *W.shape)
                       for W, part in zip(action.weights, chunk.split(sizes, 1), strict=True)]


def _forward(action: MLPAction, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and pre-activations of every layer of n networks, (n, k, batch); the last are the outputs."""
    h = with_ones(action.X) if action.bias else action.X
    inputs, Z = [h], [weights[0] @ h]
    for W in weights[1:]:
        h = action.activation.function(Z[-1])
        h = torch.cat([h, h.new_ones(len(h), 1, h.shape[-1])], 1) if action.bias else h
        inputs.append(h)
        Z.append(W @ h)
    return inputs, Z


def _losses(loss: OutputLoss, Y: Tensor) -> tuple[Tensor, Tensor]:
    """(the sum of the losses, dL/dY (n, out, batch)) of n networks' outputs Y (n, out, batch)."""
    n, columns = len(Y), Y.transpose(0, 1).flatten(1)
    # n batches side by side are one batch of the losses that are known: one call instead of n.
    if isinstance(loss, CrossEntropy):
        mean, gradient = CrossEntropy(loss.labels.repeat(n)).value_and_gradient(columns)
        return n * mean, n * gradient.unflatten(1, (n, -1)).transpose(0, 1)
    if isinstance(loss, SquaredError):
        total, gradient = SquaredError(loss.targets.repeat(1, n)).value_and_gradient(columns)
        return total, gradient.unflatten(1, (n, -1)).transpose(0, 1)
    parts = [loss.value_and_gradient(y) for y in Y]
    return torch.stack([value for value, _ in parts]).sum(), torch.stack([gradient for _, gradient in parts])


class MeanCurvature:
    """ψ(w) = mean of κ over draws M of generators; Ms[m] (draws, h_m, h_m): `curvature` with its gradient in the weights.

    The gradient is one backward pass through the closed form; pseudo-inverses turn by Golub and Pereyra's formula, which
    holds at constant rank (own; tests/minima/test_teleport_to.py). ValueError as `curvature`.

    >>> W = [torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    >>> action = MLPAction(W, torch.randn(5, 3, dtype=torch.float64))
    >>> measure = MeanCurvature(random_generators(action, 4))
    >>> abs(measure.gradient(action)[0] / measure.value(action) - 1) < 1e-12
    True
    """

    name = "curvature"

    def __init__(self, Ms: Sequence[Tensor]) -> None:
        self.Ms = list(Ms)

    @classmethod
    def drawn(cls, action: MLPAction, count: int = 32, generator: torch.Generator | None = None) -> MeanCurvature:
        """On `count` draws of `random_generators`."""
        return cls(random_generators(action, count, generator))

    def value(self, action: MLPAction) -> float:
        """ψ at the action's weights."""
        return float(curvature_of(*curve_of(action, check_generators(action, self.Ms))).mean())

    def gradient(self, action: MLPAction) -> tuple[float, list[Tensor]]:
        """(ψ, dψ/dW by layer)."""
        leaves = [W.clone().requires_grad_() for W in action.weights]
        with torch.enable_grad():
            curve = curve_of(at(action, leaves), check_generators(action, self.Ms), factors=turning_factor)
            mean = curvature_of(*curve).mean()
            gradients = torch.autograd.grad(mean, leaves, materialize_grads=True)
        return float(mean.detach()), list(gradients)
