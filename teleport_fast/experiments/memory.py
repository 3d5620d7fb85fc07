"""How much memory torch's allocator gives out on a CPU while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had given out at once during the work, by torch.profiler.

    >>> peak(lambda: torch.ones(1000)) >= 4000
    True
    """
    return usage(work)[0]


def usage(work: Callable[[], object]) -> tuple[int, int]:
    """(the most bytes given out at once during the work, how many more are out after it than before).

    >>> held = []
    >>> usage(lambda: held.append(torch.ones(1000)))[1] >= 4000
    True
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = profile.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    live = most = 0
    for event in events:
        live += event.nbytes()
        most = max(most, live)
    return most, live
