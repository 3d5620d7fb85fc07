"""Work in a fork of this process, and a pytest item run within it."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from typing import Any

import pytest
from _pytest.runner import runtestprotocol


def fork(work: Callable[[], Any]) -> tuple[int, int]:
    """Starts `work` in a fork; its process id, and the end of a pipe where it writes what the work returned, as JSON."""
    reads, writes = os.pipe()
    if child := os.fork():
        os.close(writes)
        return child, reads
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
        os.write(writes, json.dumps(work()).encode())
    finally:
        os._exit(0)


def read_all(descriptor: int) -> Any:
    with os.fdopen(descriptor, "rb") as stream:
        text = stream.read()
    return json.loads(text) if text else None


def passes(item: pytest.Item, following: pytest.Item | None, seconds: float) -> bool:
    """Whether a test passes; one that computes for much longer than it should ends the process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    reports = runtestprotocol(item, nextitem=following, log=False)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return not any(report.failed for report in reports)
