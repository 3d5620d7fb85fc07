"""When to teleport, by condition: a plateau of the gradient norm, a gradient off the Hessian's eigenvectors, a gain worth its seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from teleport_fast.schedule import Schedule, StepInfo

if TYPE_CHECKING:
    from teleport_fast.minima.alignment import Alignment


class Plateau(Schedule):
    """When the smoothed gradient norm has not fallen by the share `threshold` below its lowest for `patience` steps; then afresh.

    m ← smoothing · m + (1 − smoothing) ‖∇L‖; steps with a non-finite norm are left out. Reads the gradient norm at every step.

    >>> schedule = Plateau(patience=3)
    >>> [schedule.fires(StepInfo(step, None, lambda: 1.0)) for step in range(8)]
    [False, False, False, True, False, False, False, True]
    """

    agrees = True

    def __init__(self, patience: int = 50, threshold: float = 0.01, smoothing: float = 0.9) -> None:
        _count("patience", patience, 50)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {threshold}; 0.01 asks for a fall of one per cent")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}; 0 takes the norm as it is")
        self.patience, self.threshold, self.smoothing = patience, threshold, smoothing
        self._mean, self._lowest, self._since = math.nan, math.inf, 0

    def fires(self, info: StepInfo) -> bool:
        norm = info.gradient_norm()
        if not math.isfinite(norm):
            return False
        self._mean = norm if math.isnan(self._mean) else self.smoothing * self._mean + (1 - self.smoothing) * norm
        if self._mean < (1 - self.threshold) * self._lowest:
            self._lowest, self._since = self._mean, 0
            return False
        self._since += 1
        if self._since < self.patience:
            return False
        # After a teleport the norm is another one: the old lowest says nothing about it.
        self._mean, self._lowest, self._since = math.nan, math.inf, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "lowest": self._lowest, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._lowest, self._since = state["mean"], state["lowest"], state["since"]

    def __repr__(self) -> str:
        return f"Plateau(patience={self.patience}, threshold={self.threshold}, smoothing={self.smoothing})"


class OffEigenvector(Schedule):
    """Every `every` steps, where ‖Hg − λg‖/‖Hg‖ > threshold: along an eigenvector a teleport gains nothing to first order.

    loss_fn(): the loss of the optimizer's parameters, with a graph; asked at those steps only, for a forward, a backward and one
    Hessian-vector product. `last` is the newest Alignment. Source: `hessian_alignment`, docs/theory.md.

    >>> w = torch.tensor([9.0, 1.0], requires_grad=True)
    >>> optimizer = torch.optim.SGD([w])
    >>> OffEigenvector(lambda: w[0] ** 2 + 9 * w[1] ** 2, every=1).fires(StepInfo(0, optimizer, lambda: 1.0))
    True
    >>> OffEigenvector(lambda: w[0] ** 2 + w[1] ** 2, every=1).fires(StepInfo(0, optimizer, lambda: 1.0))
    False
    """

    def __init__(self, loss_fn: Callable[[], Tensor], threshold: float = 0.1, every: int = 10) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}; pass a function without arguments")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {threshold}; 0.1 is the default")
        _count("every", every, 10)
        self.loss_fn, self.threshold, self.every = loss_fn, threshold, every
        self.last: Alignment | None = None

    def fires(self, info: StepInfo) -> bool:
        from teleport_fast.minima.alignment import hessian_alignment  # the papers' part is loaded where it is used

        if info.step % self.every:
            return False
        params = [p for group in info.optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.last = hessian_alignment(self.loss_fn, params)
        return self.last.residual > self.threshold

    def __repr__(self) -> str:
        return f"OffEigenvector(threshold={self.threshold}, every={self.every})"


class WorthItsTime(Schedule):
    """When the last teleport's gain, held for `horizon` steps, is predicted to beat the plain steps that its seconds would buy.

    A step lowers the loss by lr · J to first order, J the objective. A teleport that takes J to ρJ gains horizon (ρ − 1) such
    decreases and costs seconds / (seconds of a step) of them: it fires, at most every `horizon` steps, while the first is larger.
    The first teleport is the probe that measures both; where one was not worth it, the next probe comes 2, 4, 8, … horizons later.
    For objectives that go up. Not the same on two runs: it reads a clock (`clock`, seconds).

    >>> WorthItsTime(horizon=5).fires(StepInfo(0, None, lambda: 1.0))
    True
    """

    def __init__(self, horizon: int = 10, clock: Callable[[], float] = time.perf_counter) -> None:
        _count("horizon", horizon, 10)
        if not callable(clock):
            raise TypeError(f"clock must be callable, got {type(clock).__name__}; time.perf_counter is the default")
        self.horizon, self.clock = horizon, clock
        self._due, self._wait = 0, 1
        self._before = math.nan
        self._steps: list[float] = []
        self._judged: int | None = None

    def fires(self, info: StepInfo) -> bool:
        now, last = self.clock(), info.last_teleport()
        # The first step after a teleport holds the teleport itself, so it is not a step's time.
        if not math.isnan(self._before):
            self._steps = [*self._steps[-20:], now - self._before]
        self._before = now
        if info.step < self._due:
            return False
        if last is not None and last.step != self._judged:
            self._judged = last.step
            self._wait = 1 if self.worth(last.objective_before, last.objective_after, last.seconds) else 2 * self._wait
            if self._wait > 1:
                self._due = info.step + (self._wait - 1) * self.horizon
                return False
        self._due, self._before = info.step + self.horizon, math.nan
        return True

    def worth(self, before: float, after: float, seconds: float) -> bool:
        """Whether horizon (after/before − 1) exceeds seconds over the median step's; True while no step was timed."""
        if not self._steps or not before > 0:
            return True
        from statistics import median  # decimal and fractions come with it: a tenth of this package's own import

        return self.horizon * (after / before - 1) * median(self._steps) > seconds

    def __repr__(self) -> str:
        return f"WorthItsTime(horizon={self.horizon})"


class First(Schedule):
    """The first `count` times that another schedule fires: one teleport, by condition.

    >>> schedule = First(Plateau(patience=1, smoothing=0.0))
    >>> [schedule.fires(StepInfo(step, None, lambda: 1.0)) for step in range(5)]
    [False, True, False, False, False]
    """

    def __init__(self, schedule: Schedule, count: int = 1) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}; pass for example Plateau()")
        _count("count", count, 1)
        self.schedule, self.count, self.fired = schedule, count, 0

    def fires(self, info: StepInfo) -> bool:
        if self.fired >= self.count or not self.schedule.fires(info):
            return False
        self.fired += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"fired": self.fired, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fired = state["fired"]
        self.schedule.load_state_dict(state["schedule"])

    def __repr__(self) -> str:
        return f"First({self.schedule!r})" if self.count == 1 else f"First({self.schedule!r}, count={self.count})"


def _count(name: str, value: object, default: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}; {default} is the default")
