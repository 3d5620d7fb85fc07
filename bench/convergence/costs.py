"""What a step of each arm costs, measured while all take turns, so that a busy machine is busy for each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Protocol

ROUNDS, STEPS = 5, 5


class Advances(Protocol):
    """A training that can take one more step."""

    def advance(self) -> object: ...


def step_seconds(runs: Mapping[str, Advances]) -> dict[str, float]:
    """Median over rounds of a step's CPU time in this thread, by arm; the first round is left out."""
    seconds: dict[str, list[float]] = {arm: [] for arm in runs}
    for turn in range(ROUNDS + 1):
        for arm, run in runs.items():
            begun = time.thread_time()
            for _ in range(STEPS):
                run.advance()
            if turn:
                seconds[arm].append((time.thread_time() - begun) / STEPS)
    return {arm: statistics.median(values) for arm, values in seconds.items()}
