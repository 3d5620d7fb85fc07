"""What a teleport did, read back from the device only when somebody asks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeleportRecord:
    """What one teleport did; `radius_used` is the longest factor of log g (rotations: ‖Q − I‖_F).

    `condition` is the largest condition number of a g, 1 for rotations, where somebody asks for it: `attach(on_teleport=...)`,
    or `teleporter.with_condition = True`; nan elsewhere.
    """

    step: int
    objective_before: float
    objective_after: float
    radius_used: float
    seconds: float
    joints: int
    condition: float = math.nan


@dataclass(frozen=True)
class Pending:
    """A record whose numbers still lie on the device; they are read when somebody asks."""

    step: int
    before: Tensor
    after: Tensor
    radius: Tensor
    seconds: float
    joints: int
    skipped: Tensor | None = None
    condition: Tensor | None = None

    def void(self) -> bool:
        """Whether the step was skipped on the device, and the move with it."""
        return self.skipped is not None and bool(self.skipped)

    def read(self) -> TeleportRecord:
        before, after, radius = float(self.before), float(self.after), float(self.radius)
        condition = math.nan if self.condition is None else float(self.condition)
        return TeleportRecord(self.step, before, after, radius, self.seconds, self.joints, condition)
