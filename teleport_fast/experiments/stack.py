"""Equal networks of several seeds trained as one: weights stacked along a first axis, so that a step costs little more than one's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from teleport_fast.data_dependent import MLPAction, TeleportReport
from teleport_fast.data_dependent.losses import LossFunction
from teleport_fast.data_dependent.state import Push, projected, pusher
from teleport_fast.state import ROLES
from teleport_fast.symmetry.bucket import SQUARE

OPTIMIZERS: dict[str, Callable[[Sequence[Tensor], float], Optimizer]] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "AdaGrad": lambda p, lr: torch.optim.Adagrad(p, lr),
    "RMSProp": lambda p, lr: torch.optim.RMSprop(p, lr),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr),
}


class Stack:
    """`weights[l]` (seeds, out, in), no biases, LeakyReLU; torch's optimizers act on each entry alone, so seeds never meet."""

    def __init__(self, weights: Sequence[Tensor], slope: float = 0.1) -> None:
        self.weights = [weight.detach().clone().requires_grad_() for weight in weights]
        self.slope = slope

    @classmethod
    def uniform(cls, widths: Sequence[int], seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> Stack:
        """Each weight even in ±1/√inputs, as published, from a stream of its seed's own.

        >>> [tuple(weight.shape) for weight in Stack.uniform((4, 3, 2), (0, 1)).weights]
        [(2, 3, 4), (2, 2, 3)]
        """
        drawn = []
        for seed in seeds:
            stream = torch.Generator().manual_seed(54321 * (seed + 1))
            pairs = itertools.pairwise(widths)
            drawn.append([(2 * torch.rand(after, before, generator=stream, dtype=dtype) - 1) / before**0.5 for before, after in pairs])
        return cls([torch.stack(layer) for layer in zip(*drawn, strict=True)])

    def outputs(self, X: Tensor) -> Tensor:
        """(seeds, out, batch) of X (inputs, batch)."""
        return self.like(self.weights, X)

    def cross_entropy(self, X: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy by seed, (seeds,)."""
        outputs = self.outputs(X)
        rows = nn.functional.cross_entropy(outputs.transpose(1, 2).flatten(0, 1), labels.repeat(len(outputs)), reduction="none")
        return rows.view(len(outputs), -1).mean(1)

    def accuracy(self, X: Tensor, labels: Tensor) -> Tensor:
        """Share of right answers by seed, (seeds,)."""
        return (self.outputs(X).argmax(1) == labels).double().mean(1)

    def of(self, seed: int) -> list[Tensor]:
        """The weights of one seed's network, by its place in the stack."""
        return [weight.detach()[seed] for weight in self.weights]

    def finite(self, seed: int) -> bool:
        """Whether that network can still be trained."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.of(seed))

    def like(self, weights: Sequence[Tensor], X: Tensor) -> Tensor:
        """Outputs of other weights with this activation, stacked or one network's."""
        h = X
        for weight in weights[:-1]:
            h = nn.functional.leaky_relu(weight @ h, self.slope)
        return weights[-1] @ h

    @torch.no_grad()
    def write_(self, seed: int, weights: Sequence[Tensor]) -> None:
        """Moved weights of one seed."""
        for mine, new in zip(self.weights, weights, strict=True):
            mine[seed].copy_(new)

    def teleport_(
        self,
        seed: int,
        X: Tensor,
        loss_fn: LossFunction,
        optimizer: Optimizer | None = None,
        form: str = "u_exact",
        second_moments: str = "keep",
        **options: object,
    ) -> TeleportReport:
        """data_dependent.teleport_ of one seed; with an optimizer its state is carried."""
        action = MLPAction(self.of(seed), X, self.slope, form)
        result = action.teleport(loss_fn, **options)  # type: ignore[arg-type]
        if optimizer is not None and not result.report.undone:
            self._carry(seed, optimizer, pusher(action, result.report.elements()), second_moments)
        self.write_(seed, result.weights)
        return result.report

    def _carry(self, seed: int, optimizer: Optimizer, push: Push, second_moments: str) -> None:
        for key in sorted({key for weight in self.weights for key in optimizer.state.get(weight, {}) if key in ROLES}):
            entries = [optimizer.state[weight][key] for weight in self.weights]
            if entries[0] is None:
                continue
            blocks = [entry[seed] for entry in entries]
            if ROLES[key] == SQUARE and second_moments == "keep":
                continue
            for block, moved in zip(blocks, projected(blocks, push) if ROLES[key] == SQUARE else push(blocks), strict=True):
                block.copy_(moved)
