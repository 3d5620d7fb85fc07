"""The write phase of a move (docs/adr/0005): signals held, a write that raises taken up again, what is left finished at the next touch."""

from __future__ import annotations

from collections.abc import Callable

from teleport_fast.called import full_precision
from teleport_fast.plan import Plan
from teleport_fast.writes import TRIES, Write, Writes, deliver, signals_held


class WritePhase:
    """What one teleporter still has to write, and the signals that wait for it.

    holds_signals: those that come during a move wait for `deliver`, that is for the way back; otherwise for its last write.
    """

    def __init__(self, plan: Plan, holds_signals: bool, warn: Callable[[str], None]) -> None:
        self._plan, self._holds_signals, self._warn = plan, holds_signals, warn
        self._left = Writes()
        self._signals: list[int] = []

    @property
    def unfinished(self) -> bool:
        return bool(self._left)

    def listed(self, writes: list[Write]) -> Writes:
        # a rank that called an op again alone would wait for the others
        return Writes(writes, 1 if self._plan.place.sharded else TRIES)

    def commit(self, writes: Writes) -> None:
        """Do all of them; a signal that comes meanwhile is delivered after them, or by `deliver`."""
        with signals_held(self._signals if self._holds_signals else None):
            self._left = writes
            self.finish()

    def finish(self) -> None:
        if not self._left:
            return
        writes, overcome = self._left, list[BaseException]()
        try:
            with full_precision(("cpu", "cuda")):
                overcome = writes.finish()
        finally:
            if not writes or not writes.begun:
                self._left = Writes()
            elif self._plan.place.sharded:
                self._left = Writes()
                self._warn("a move failed on this rank, whose weights are between two points of their orbit; resume from a checkpoint")
            else:
                self._warn(
                    "a move could not be finished, the network is between two points of its orbit; it is finished before the next "
                    "step, state_dict() of the optimizer or detach(): call one of these before the weights are used"
                )
        for error in overcome:
            if not isinstance(error, Exception):
                raise error
            self._warn(f"a write of the move raised ({error!r}) and was taken up again; the move is whole")

    def deliver(self) -> None:
        """Let the signals that waited come."""
        deliver(self._signals)

    def forget(self) -> None:
        """Weights that were loaded anew owe nothing to an earlier move."""
        self._left = Writes()
