"""What a teleport did, read back from the device only when somebody asks."""

from __future__ import annotations

from array import array
from dataclasses import astuple, dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeleportRecord:
    """What one teleport did; `radius_used` is the longest factor of log g (rotations: ‖Q − I‖_F)."""

    step: int
    objective_before: float
    objective_after: float
    radius_used: float
    seconds: float
    joints: int


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

    def void(self) -> bool:
        """Whether the step was skipped on the device, and the move with it."""
        return self.skipped is not None and bool(self.skipped)

    def read(self) -> TeleportRecord:
        before, after, radius = float(self.before), float(self.after), float(self.radius)
        return TeleportRecord(self.step, before, after, radius, self.seconds, self.joints)


class History:
    """One record per teleport, oldest first. The latest still lie on the device; older ones are kept as 48 bytes each.

    They are read back half of `LATEST` at a time, so that a run of a million teleports neither waits at each nor grows by their
    tensors (about 2 kB a record).
    """

    LATEST = 512

    def __init__(self) -> None:
        self._packed = array("d")
        self._latest: list[Pending] = []

    def append(self, pending: Pending) -> None:
        self._latest.append(pending)
        if len(self._latest) >= self.LATEST:
            oldest, self._latest = self._latest[: self.LATEST // 2], self._latest[self.LATEST // 2 :]
            for record in (pending.read() for pending in oldest if not pending.void()):
                self._packed.extend(astuple(record))

    def read(self) -> list[TeleportRecord]:
        rows = (self._packed[i : i + 6] for i in range(0, len(self._packed), 6))
        older = [
            TeleportRecord(int(step), before, after, radius, seconds, int(joints))
            for step, before, after, radius, seconds, joints in rows
        ]
        return older + [pending.read() for pending in self._latest if not pending.void()]

    def last(self) -> TeleportRecord | None:
        """The last record that was not void."""
        found = next((pending.read() for pending in reversed(self._latest) if not pending.void()), None)
        return found if found is not None or not self._packed else self.read()[-1]
