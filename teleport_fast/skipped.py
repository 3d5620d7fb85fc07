"""A step that is skipped whole: the base optimizer sees no gradient, and gets them back afterwards."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.optim import Optimizer

# optimizers whose present step a teleporter skips: another one on the same optimizer finds no gradient and stays quiet
_skipping: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def is_skipping(optimizer: Optimizer) -> bool:
    return optimizer in _skipping


class PutAside:
    """The gradients that one teleporter has put aside for the present step."""

    def __init__(self) -> None:
        self._gradients: list[tuple[Tensor, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._gradients)

    def take(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, _ in self._gradients:
            parameter.grad = None
        _skipping.add(optimizer)

    def give_back(self, optimizer: Optimizer) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self.forget(optimizer)

    def forget(self, optimizer: Optimizer) -> None:
        """A step that raised: its gradients are void."""
        self._gradients = []
        _skipping.discard(optimizer)
