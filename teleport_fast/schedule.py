"""When to teleport: schedules that fire before chosen optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from teleport_fast.record import TeleportRecord


@dataclass
class StepInfo:
    """What a condition may look at: the number of steps taken so far, the optimizer, on demand the gradient norm and the last record."""

    step: int
    optimizer: Optimizer
    gradient_norm: Callable[[], float]
    last_teleport: Callable[[], TeleportRecord | None] = lambda: None


class Schedule(ABC):
    """Says before each optimizer step whether to teleport.

    `agrees`: whether it says the same on every rank of a model that lies on many, as what goes by the step or the gradient norm
    does. What goes by a clock, a rank's own batch or a user's function may not: there the first rank's word holds for all.
    """

    agrees = False

    @abstractmethod
    def fires(self, info: StepInfo) -> bool: ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must carry, besides the step counter; {} for most."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from state_dict(); ValueError for a memory that this schedule does not have."""
        if state:
            raise ValueError(f"{self!r} has no memory, got {sorted(state)}; load it with the schedule that it was saved with")


class At(Schedule):
    """Before the given steps, counted from 0.

    >>> At(0, 10).steps == {0, 10}
    True
    """

    agrees = True

    def __init__(self, *steps: int | Iterable[int]) -> None:
        chosen: set[int] = set()
        for step in chain.from_iterable(s if isinstance(s, Iterable) else (s,) for s in steps):
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise ValueError(f"steps must be integers of at least 0, got {step!r}; steps count from 0")
            chosen.add(step)
        self.steps = frozenset(chosen)

    def fires(self, info: StepInfo) -> bool:
        return info.step in self.steps

    def __repr__(self) -> str:
        return f"At({', '.join(map(str, sorted(self.steps)))})"


class Every(Schedule):
    """Before steps n, 2n, 3n, … (counted from 0), `count` times at most when it is given."""

    agrees = True

    def __init__(self, n: int, count: int | None = None) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be an integer of at least 1, got {n!r}; Every(100) fires every 100 steps")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"count must be an integer of at least 1 or None, got {count!r}; None is no limit")
        self.n, self.count = n, count

    def fires(self, info: StepInfo) -> bool:
        turn, rest = divmod(info.step, self.n)
        return rest == 0 and turn > 0 and (self.count is None or turn <= self.count)

    def __repr__(self) -> str:
        return f"Every({self.n})" if self.count is None else f"Every({self.n}, count={self.count})"


class Once(At):
    """Before one step, the first by default."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(step)

    def __repr__(self) -> str:
        return f"Once({min(self.steps)})"


class When(Schedule):
    """Whenever `condition(info)` is true; info has `.step`, `.optimizer` and `.gradient_norm()`.

    >>> schedule = When(lambda info: info.step % 50 == 10)
    """

    def __init__(self, condition: Callable[[StepInfo], bool]) -> None:
        if not callable(condition):
            raise TypeError(f"condition must be callable, got {type(condition).__name__}; pass a function of StepInfo")
        self.condition = condition

    def fires(self, info: StepInfo) -> bool:
        return bool(self.condition(info))

    def __repr__(self) -> str:
        return f"When({getattr(self.condition, '__name__', self.condition)!s})"
