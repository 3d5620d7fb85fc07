"""The gradients of one step and their norm: gathered, unscaled and measured when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.called import unscale_
from teleport_fast.plan import Plan


class Gradients:
    """All gradients of one step and their norm, unscaled and gathered when somebody asks."""

    __slots__ = ("_everything", "_norm", "_optimizer", "_plan")

    def __init__(self, plan: Plan, optimizer: Optimizer) -> None:
        self._plan, self._optimizer = plan, optimizer
        self._everything: dict[str, Tensor] | None = None
        self._norm: float | None = None

    def everything(self) -> dict[str, Tensor]:
        if self._everything is None:
            with torch.no_grad():
                unscale_(self._optimizer)
            self._everything = self._plan.gradients(self._optimizer)
        return self._everything

    def norm(self) -> float:
        if self._norm is None:
            with torch.no_grad():
                everything = self.everything()
                self._norm = float(self._plan.place.norm(everything))
        return self._norm
