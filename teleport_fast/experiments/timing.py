"""How long routes take beside each other: they take turns on one thread, so that a busy machine is busy for each."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Calls = dict[str, Callable[[], object]]


def clock() -> float:
    """Seconds: this thread's CPU time where torch has one thread, which other processes disturb less than the clock on the wall."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    """What one call takes by `clock`.

    >>> seconds(lambda: None) >= 0
    True
    """
    start = clock()
    call()
    return clock() - start


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    least: float = 0.0,
    around: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> dict[str, list[float]]:
    """Seconds by route, one a round; `rounds` rounds, or up to ten times as many until `least` seconds have passed.

    Every round has an order of its own, so that no route always finds in the caches what the same one left. The first `warm_up`
    rounds do not count. `around(name)` is entered before a route's call and is not timed.

    >>> {name: len(found) for name, found in interleaved({"a": lambda: None, "b": lambda: None}, 3).items()}
    {'a': 3, 'b': 3}
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    names, start, number = list(calls), clock(), 0
    while number < rounds + warm_up or (clock() - start < least and number < 10 * rounds + warm_up):
        for name in random.Random(number).sample(names, len(names)):
            with around(name):
                spent = seconds(calls[name])
            if number >= warm_up:
                found[name].append(spent)
        number += 1
    return found


def repeated(call: Callable[[], object], least: float) -> tuple[Callable[[], object], int]:
    """The call, as often as it takes to fill `least` seconds, and how often that is: short calls are timed in bundles.

    >>> repeated(lambda: None, 0.0)[1]
    1
    """
    call()
    # the least of three: a call that was interrupted would stand for a long one
    times = max(1, min(1000, round(least / max(min(seconds(call) for _ in range(3)), 1e-7))))

    def bundle() -> None:
        for _ in range(times):
            call()

    return (call, 1) if times == 1 else (bundle, times)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; of one value, itself.

    >>> spread([1.0, 2.0, 3.0])
    {'median': 2.0, 'low': 1.0, 'high': 3.0}
    """
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return {"median": median, "low": low, "high": high}


def ratios(found: Mapping[str, Sequence[float]], ours: str, theirs: str, factor: float = 1.0) -> list[float]:
    """factor · theirs / ours, round by round: over 1 where ours is faster."""
    return [factor * b / a for a, b in zip(found[ours], found[theirs], strict=True)]


def compare(found: Mapping[str, Sequence[float]], ours: str, theirs: str, factor: float = 1.0) -> str:
    """Median of `ratios` with quartiles, as text.

    >>> compare({"a": [1.0, 1.0, 1.0], "b": [1.0, 2.0, 3.0]}, "a", "b")
    '2.00 [1.00, 3.00]'
    """
    of = spread(ratios(found, ours, theirs, factor))
    return f"{of['median']:.2f} [{of['low']:.2f}, {of['high']:.2f}]"
