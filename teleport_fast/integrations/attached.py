"""Which teleporters sit on an optimizer that a training stack hands out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from teleport_fast.optimizer import Teleport, attached_to
from teleport_fast.record import TeleportRecord
from teleport_fast.teleporter import Teleporter


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer that has the step hooks: without accelerate's, Lightning's and our own wrapper.

    Errors: TypeError for what wraps no optimizer.
    """
    while not isinstance(optimizer, Optimizer) or isinstance(optimizer, Teleport) or _is_wrapper(optimizer):
        inner = optimizer.base if isinstance(optimizer, Teleport) else getattr(optimizer, "optimizer", None)
        if inner is None:
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or wrap one in .optimizer, got {kind}; pass AdamW(...)")
        optimizer = inner
    return optimizer


def _is_wrapper(optimizer: Optimizer) -> bool:
    """Wrappers have the class of what they wrap, or none of its hooks."""
    return isinstance(getattr(optimizer, "optimizer", None), Optimizer)


def teleporters(optimizers: Iterable[Any]) -> list[Teleporter]:
    """The teleporters that are attached to these optimizers, in the order in which they were."""
    return [teleporter for optimizer in optimizers for teleporter in attached_to(innermost(optimizer))]


class Fresh:
    """The records of some teleporters that have not been asked for yet."""

    def __init__(self, teleporters: Iterable[Teleporter]) -> None:
        self.teleporters = list(teleporters)
        self._seen = [len(teleporter.history) for teleporter in self.teleporters]

    def take(self) -> list[TeleportRecord]:
        """The new ones, by step; each is given once. This is where their numbers are read off the device."""
        found: list[TeleportRecord] = []
        for i, teleporter in enumerate(self.teleporters):
            history = teleporter.history
            found += history[self._seen[i] :]
            self._seen[i] = len(history)
        return sorted(found, key=lambda record: record.step)


class Memory:
    """What a checkpoint must carry beside the optimizer's: the state of each teleporter, by number."""

    @staticmethod
    def of(teleporters: Iterable[Teleporter]) -> dict[str, Any]:
        return {str(i): teleporter.state_dict() for i, teleporter in enumerate(teleporters)}

    @staticmethod
    def load(teleporters: list[Teleporter], state: dict[str, Any]) -> None:
        """Errors: ValueError for the state of another number of teleporters."""
        if len(state) != len(teleporters):
            raise ValueError(
                f"the checkpoint has the state of {len(state)} teleporters, and {len(teleporters)} are attached; "
                f"attach as the run did that saved it"
            )
        for i, teleporter in enumerate(teleporters):
            teleporter.load_state_dict(state[str(i)])

    @staticmethod
    def is_needed(teleporters: Iterable[Teleporter]) -> bool:
        """Whether going on without it is another run: the eigenbasis' covariances, a held basis, a schedule's memory."""
        return any(teleporter.remembers for teleporter in teleporters)


