"""Schedules fire before the steps that they name, and refuse what they cannot mean."""

from __future__ import annotations

import pytest
import torch

from teleport_fast import At, Every, Once, Schedule, StepInfo, When


def fired(schedule: Schedule, steps: int = 30, gradient_norm: float = 1.0) -> list[int]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    return [step for step in range(steps) if schedule.fires(StepInfo(step, optimizer, lambda: gradient_norm))]


def test_at_fires_before_the_named_steps_counted_from_zero() -> None:
    assert fired(At(0, 3, 29, 500)) == [0, 3, 29]
    assert fired(At([3, 0, 3])) == [0, 3]
    assert fired(At(range(0, 30, 10))) == [0, 10, 20]
    assert fired(At(1, range(5, 7))) == [1, 5, 6]


def test_at_without_steps_never_fires() -> None:
    assert fired(At()) == fired(At([])) == []


def test_every_starts_after_the_first_n_steps() -> None:
    assert fired(Every(10)) == [10, 20]
    assert fired(Every(1), steps=4) == [1, 2, 3]
    assert fired(Every(50)) == []


def test_every_stops_after_count_times() -> None:
    assert fired(Every(7, count=2)) == [7, 14]
    assert fired(Every(7, count=100)) == [7, 14, 21, 28]


def test_once_fires_once_and_at_the_first_step_by_default() -> None:
    assert fired(Once()) == [0]
    assert fired(Once(5)) == [5]


def test_when_asks_the_condition_about_the_step_and_the_gradient() -> None:
    assert fired(When(lambda info: info.step % 10 == 3)) == [3, 13, 23]
    small = When(lambda info: info.gradient_norm() < 0.1)
    assert fired(small, steps=2, gradient_norm=0.05) == [0, 1]
    assert fired(small, steps=2, gradient_norm=0.5) == []
    assert fired(When(lambda info: info.optimizer.param_groups[0]["lr"] > 1), steps=2) == []


def test_the_gradient_norm_is_computed_only_when_asked_for() -> None:
    def expensive() -> float:
        raise AssertionError("nobody asked")

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    for schedule in (At(0), Every(1), Once(), When(lambda info: info.step == 0)):
        schedule.fires(StepInfo(0, optimizer, expensive))
    with pytest.raises(AssertionError, match="nobody asked"):
        When(lambda info: info.gradient_norm() > 0).fires(StepInfo(0, optimizer, expensive))


def test_when_accepts_any_truth_value() -> None:
    assert When(lambda info: torch.tensor(True)).fires(StepInfo(0, torch.optim.SGD([torch.zeros(1)]), float)) is True


def test_schedules_print_as_they_were_written() -> None:
    def condition(info: StepInfo) -> bool:
        return False

    schedules = [At(5, 2), Every(10), Every(10, count=3), Once(4), When(condition)]
    assert list(map(repr, schedules)) == ["At(2, 5)", "Every(10)", "Every(10, count=3)", "Once(4)", "When(condition)"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: At(-1), ValueError, "steps must be integers of at least 0, got -1; steps count from 0"),
        (lambda: At(1.5), ValueError, "steps must be integers of at least 0, got 1.5"),
        (lambda: At([0, 2.0]), ValueError, "got 2.0"),
        (lambda: At(True), ValueError, "got True"),
        (lambda: At("10"), ValueError, "got '1'"),
        (lambda: Once(-3), ValueError, "got -3"),
        (lambda: Every(0), ValueError, "n must be an integer of at least 1, got 0; "),
        (lambda: Every(-2), ValueError, "n must be an integer of at least 1, got -2"),
        (lambda: Every(2.5), ValueError, "n must be an integer of at least 1, got 2.5"),
        (lambda: Every(True), ValueError, "n must be an integer of at least 1, got True"),
        (lambda: Every(3, count=0), ValueError, "count must be an integer of at least 1 or None, got 0"),
        (lambda: Every(3, count=1.5), ValueError, "count must be an integer of at least 1 or None, got 1.5"),
        (lambda: When(10), TypeError, "condition must be callable, got int; pass a function of StepInfo"),
    ],
)
def test_impossible_schedules_are_refused(make: object, error: type[Exception], message: str) -> None:
    assert callable(make)
    with pytest.raises(error, match=message):
        make()
