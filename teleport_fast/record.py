"""What a teleport did, read back from the device only when somebody asks."""

from __future__ import annotations

import math
from array import array
from dataclasses import astuple, dataclass

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


class Records:
    """One entry per teleport, oldest first: the latest may still lie on the device, older ones are kept as 56 bytes each.

    They are read back half of `LATEST` at a time, so that a run of a million teleports neither waits at each nor grows by their
    tensors (about 2 kB a record).
    """

    LATEST = 512

    def __init__(self) -> None:
        self._packed = array("d")
        self._latest: list[Pending | TeleportRecord] = []

    def append(self, entry: Pending | TeleportRecord) -> None:
        self._latest.append(entry)
        if len(self._latest) >= self.LATEST:
            oldest, self._latest = self._latest[: self.LATEST // 2], self._latest[self.LATEST // 2 :]
            for record in _settled(oldest):
                self._packed.extend(astuple(record))

    def read(self) -> list[TeleportRecord]:
        """All of them; each is read off the device once, when somebody asks. Void ones are left out."""
        rows = (self._packed[i : i + 7] for i in range(0, len(self._packed), 7))
        older = [
            TeleportRecord(int(step), before, after, radius, seconds, int(joints), condition)
            for step, before, after, radius, seconds, joints, condition in rows
        ]
        latest = _settled(self._latest)
        self._latest = [*latest]
        return older + latest

    def last(self) -> TeleportRecord | None:
        """The last record that was not void."""
        latest = _settled(self._latest)
        self._latest = [*latest]
        if latest:
            return latest[-1]
        return self.read()[-1] if self._packed else None


def _settled(entries: list[Pending | TeleportRecord]) -> list[TeleportRecord]:
    kept = (entry for entry in entries if isinstance(entry, TeleportRecord) or not entry.void())
    return [entry if isinstance(entry, TeleportRecord) else entry.read() for entry in kept]
