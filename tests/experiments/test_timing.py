"""Interleaved timing: every route every round, in orders that differ, and only the call on the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from teleport_fast.experiments.timing import clock, interleaved, ratios, repeated, seconds, spread

pytestmark = pytest.mark.usefixtures("one_thread")


def burn(milliseconds: float) -> None:
    end = time.thread_time() + milliseconds / 1e3
    while time.thread_time() < end:
        pass


def test_routes_take_turns_and_no_route_always_follows_the_same_one() -> None:
    called: list[str] = []
    found = interleaved({name: lambda name=name: called.append(name) for name in "abc"}, 12, warm_up=2)
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert len(rounds) == 14 and all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {name: len(times) for name, times in found.items()} == {"a": 12, "b": 12, "c": 12}
    assert len({tuple(turn) for turn in rounds}) > 2
    again: list[str] = []
    interleaved({name: lambda name=name: again.append(name) for name in "abc"}, 12, warm_up=2)
    assert again == called


def test_what_is_entered_around_a_call_is_not_timed() -> None:
    entered: list[str] = []

    @contextmanager
    def around(name: str) -> Iterator[None]:
        entered.append(name)
        burn(20)
        yield
        burn(20)

    found = interleaved({"a": lambda: burn(1), "b": lambda: None}, 2, warm_up=0, around=around)
    assert sorted(entered) == ["a", "a", "b", "b"]
    assert all(0.9e-3 < value < 15e-3 for value in found["a"]) and max(found["b"]) < 1e-3


def test_more_rounds_until_enough_time_has_passed_but_ten_times_as_many_at_most() -> None:
    assert len(interleaved({"a": lambda: burn(1)}, 2, least=0.008)["a"]) in range(4, 9)
    assert len(interleaved({"a": lambda: None}, 2, least=60.0)["a"]) == 20


def test_one_thread_is_timed_by_its_own_cpu_time() -> None:
    assert seconds(lambda: time.sleep(0.03)) < 0.02
    torch.set_num_threads(2)
    assert seconds(lambda: time.sleep(0.03)) > 0.02
    assert abs(clock() - time.perf_counter()) < 1.0


def test_short_calls_are_bundled_and_long_ones_are_not() -> None:
    calls: list[int] = []
    bundle, times = repeated(lambda: (calls.append(1), burn(0.2)), 2e-3)
    assert times in range(5, 12)
    calls.clear()
    bundle()
    assert len(calls) == times
    assert repeated(lambda: burn(3), 1e-3)[1] == 1


def test_a_ratio_is_taken_within_a_round() -> None:
    found = {"ours": [1.0, 10.0], "theirs": [2.0, 20.0]}
    assert ratios(found, "ours", "theirs") == [2.0, 2.0] and ratios(found, "ours", "theirs", 0.5) == [1.0, 1.0]
    assert spread([4.0]) == {"median": 4.0, "low": 4.0, "high": 4.0}
