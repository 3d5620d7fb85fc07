"""What the protocol asks of a task, and what it gets: the one interface between the harness and everything it trains."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What every arm has to spend: the first rates times its choices, on each tuning seed.
RATES, TRIALS = 6, 18


@dataclass(frozen=True)
class Trial:
    """One training: an arm at a peak learning rate with its tuned options, for a share of the task's steps.

    The schedule is the arm's whole decayed one, squeezed into that share: half the steps is no run cut off in the middle.
    """

    arm: str
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


@dataclass
class Result:
    """What one seed of a trial gave. `final`: the loss that the task is judged by, at the end, infinite after divergence.

    `curve`: (steps done, that loss) at the task's own places, ending with `final`. `measures`: what else the table shows.
    `seconds`, `optimizer_seconds`: CPU time of the training alone, and of the optimizer's part of it; 0 where they say nothing, as in
    a stack of networks (Task.cost does then).
    """

    seed: int
    final: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    optimizer_seconds: float = 0.0

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.final)


@dataclass(frozen=True)
class Space:
    """Where an arm's tuning begins: six peak rates on a logarithmic grid, and the choices of all other options.

    Every arm has TRIALS trials a seed: one with fewer choices has its rates more finely spaced (`grid`).
    """

    rates: tuple[float, ...]
    choices: tuple[Mapping[str, Any], ...] = ({},)

    def __post_init__(self) -> None:
        if len(self.rates) < RATES or not all(b > a > 0 for a, b in zip(self.rates, self.rates[1:], strict=False)):
            raise ValueError(f"rates must be at least {RATES} positive rates in rising order, got {self.rates}")
        if not self.choices or len(self.choices) > TRIALS // RATES:
            most = TRIALS // RATES
            raise ValueError(f"choices must be 1 to {most} dicts, got {len(self.choices)}; {RATES} rates each make {TRIALS} trials at most")

    @classmethod
    def around(cls, rate: float, choices: Sequence[Mapping[str, Any]] = ({},), factor: float = 2.0) -> Space:
        """Six rates, neighbours `factor` apart, with `rate` the third.

        >>> Space.around(0.004).rates
        (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
        """
        return cls(tuple(float(f"{rate * factor**place:.3g}") for place in range(-2, 4)), tuple(choices))

    def grid(self, trials: int = TRIALS) -> tuple[float, ...]:
        """The rates of the first round: as many as `trials` allows with these choices, between the same ends.

        >>> len(Space.around(0.004).grid()), len(Space.around(0.004, [{}] * 3).grid())
        (18, 6)
        """
        count = max(RATES, trials // len(self.choices))
        if count == len(self.rates):
            return self.rates
        low, high = math.log(self.rates[0]), math.log(self.rates[-1])
        return tuple(float(f"{math.exp(low + (high - low) * place / (count - 1)):.3g}") for place in range(count))


class Task(ABC):
    """One problem: its arms, what each may tune, and a training. Subclasses hold no state between trainings."""

    name: str
    # what `final` is, for tables and pictures
    loss: str
    # "ratio": losses span decades, seeds are compared by their quotients; "difference": by what is between them
    compared_by: str = "difference"
    # how tables call a run without a final loss
    failed: str = "diverged"
    steps: int
    # the arms of `--arms` by default; the first is the baseline
    arms: tuple[str, ...]
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    @abstractmethod
    def setting(self) -> dict[str, Any]:
        """Everything that a training depends on beside trial and seed, in JSON: rows of another setting do not count."""

    @abstractmethod
    def space(self, arm: str) -> Space:
        """What is tuned of an arm; ValueError for one that the task does not have."""

    @abstractmethod
    def train(self, trial: Trial, seeds: Sequence[int]) -> Iterator[Result]:
        """One result per seed, in order. A seed decides start and batches, alike for every arm."""

    def tune(self, trials: Sequence[Trial], seeds: Sequence[int]) -> Iterator[tuple[Trial, Result]]:
        """Every trial on every seed, in any order; a task that trains many at once does so here, where only `final` is asked."""
        for trial in trials:
            for result in self.train(trial, seeds):
                yield trial, result

    def score(self, results: Sequence[Result]) -> float:
        """What tuning makes small: the mean final loss over seeds, of its logarithm where losses span decades."""
        finals = [result.final for result in results]
        if not all(map(math.isfinite, finals)):
            return math.inf
        return sum(math.log(max(final, 1e-38)) if self.compared_by == "ratio" else final for final in finals) / len(finals)

    def cost(self, trials: Mapping[str, Trial]) -> dict[str, float]:
        """CPU seconds of a step of each arm, measured in turns; empty where results carry their own seconds."""
        return {}

    def references(self, arm: str) -> tuple[str, ...]:
        """The arms that this one is paired with: the baseline, and the same optimizer without what was added to it."""
        base = arm.split("+")[0]
        return tuple(dict.fromkeys(other for other in (self.arms[0], base) if other != arm and other in self.arms))
