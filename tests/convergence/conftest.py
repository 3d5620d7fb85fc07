"""A task of which nothing is trained, and one thread for all tests of the harness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from bench.convergence.interface import Result, Space, Task, Trial


class Toy(Task):
    """The loss is how far the rate is from the arm's best, in octaves, plus a part of the seed's own; nothing is trained."""

    name, loss, steps, arms = "toy", "distance", 10, ("plain", "plain+better", "other")

    def __init__(self) -> None:
        self.best = {"plain": 0.004, "plain+better": 0.004, "other": 0.004}
        self.gain = {"plain": 0.0, "plain+better": 0.25, "other": 0.1}
        self.asked: list[tuple[str, float, int]] = []

    def setting(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def space(self, arm: str) -> Space:
        choices = ({"bonus": 0.0}, {"bonus": 0.05}) if arm == "other" else ({},)
        return Space.around(0.004, choices)

    def train(self, trial: Trial, seeds: Sequence[int]) -> Iterator[Result]:
        for seed in seeds:
            self.asked.append((trial.arm, trial.rate, seed))
            final = 2 + abs(math.log2(trial.rate / self.best[trial.arm])) + 0.1 * (seed % 7) - self.gain[trial.arm]
            final += 0.01 * ((seed * 31 + len(trial.arm)) % 3) - trial.options.get("bonus", 0.0)
            yield Result(seed, final, [(5, final + 1), (10, final)], seconds=0.5)


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture(autouse=True)
def tiny_networks(one_thread: None) -> None:
    """A second thread only costs."""
