"""Schedules by condition fire where their condition says, around a real optimizer too, and refuse what they cannot mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

import teleport_fast as tf
from teleport_fast import First, OffEigenvector, Plateau, Schedule, StepInfo, WorthItsTime
from teleport_fast.record import TeleportRecord

OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)])


def fired(schedule: Schedule, norms: Sequence[float]) -> list[int]:
    return [step for step, norm in enumerate(norms) if schedule.fires(StepInfo(step, OPTIMIZER, lambda: norm))]  # noqa: B023


def test_a_plateau_is_a_norm_that_stopped_falling() -> None:
    falling = [0.9**k for k in range(60)]
    assert fired(Plateau(patience=5), falling) == []
    assert fired(Plateau(patience=5, smoothing=0.5), falling[:20] + [falling[19]] * 40)[0] > 20
    assert fired(Plateau(patience=5, smoothing=0.0), [1.0] * 13) == [5, 11]


def test_a_slow_fall_is_a_plateau_by_its_threshold() -> None:
    slow = [0.999**k for k in range(100)]
    assert fired(Plateau(patience=5, threshold=0.05, smoothing=0.0), slow)[0] == 5
    assert fired(Plateau(patience=5, threshold=0.0, smoothing=0.0), slow) == []


def test_smoothing_is_not_fooled_by_noise() -> None:
    torch.manual_seed(0)
    noisy = [0.97**k * float(torch.rand(()) + 0.5) for k in range(200)]
    assert fired(Plateau(patience=8, smoothing=0.95), noisy) == []
    assert fired(Plateau(patience=8, smoothing=0.0), noisy) != []


def test_a_norm_that_is_not_finite_is_left_out() -> None:
    assert fired(Plateau(patience=2, smoothing=0.0), [1.0, float("nan"), float("inf"), 1.0, 1.0]) == [4]


def test_off_an_eigenvector_it_fires_and_on_one_it_does_not() -> None:
    w = torch.tensor([9.0, 1.0], requires_grad=True)
    asked: list[int] = []

    def loss() -> torch.Tensor:
        asked.append(1)
        return w[0] ** 2 + 9 * w[1] ** 2

    optimizer = torch.optim.SGD([w])
    schedule = OffEigenvector(loss, threshold=0.2, every=4)
    assert [schedule.fires(StepInfo(step, optimizer, float)) for step in range(9)] == [True, *[False] * 3] * 2 + [True]
    assert len(asked) == 3 and schedule.last is not None and schedule.last.residual > 0.2
    with torch.no_grad():
        w.copy_(torch.tensor([0.0, 2.0]))
        assert not schedule.fires(StepInfo(0, optimizer, float))  # as in the teleporter's hook, without gradients
    assert schedule.last.residual < 1e-6 and schedule.last.curvature == pytest.approx(18)


class Clock:
    """A clock that a simulated run moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulate(gain: Callable[[int], float], cost: float, steps: int = 200, horizon: int = 5) -> list[int]:
    """Steps of one second, teleports of `cost` seconds that multiply the objective by gain(step): where it fires."""
    clock, last = Clock(), None
    schedule, found = WorthItsTime(horizon, clock), []
    for step in range(steps):
        if schedule.fires(StepInfo(step, OPTIMIZER, float, lambda: last)):  # noqa: B023
            found.append(step)
            clock.now += cost
            last = TeleportRecord(step, 1.0, gain(step), 0.1, cost, 1)
        clock.now += 1.0
    return found


def test_a_teleport_that_pays_comes_every_horizon_and_one_that_does_not_ever_more_rarely() -> None:
    assert simulate(lambda step: 2.0, cost=4.0)[:6] == [0, 5, 10, 15, 20, 25]
    assert simulate(lambda step: 2.0, cost=6.0)[:5] == [0, 10, 30, 70, 150]
    assert simulate(lambda step: 1.0, cost=1e-3)[:5] == [0, 10, 30, 70, 150]


def test_what_was_never_timed_or_rose_from_nothing_is_worth_it() -> None:
    schedule = WorthItsTime(horizon=5)
    assert schedule.worth(1.0, 1.0, 1e9)  # no step was timed: nothing to weigh it against
    schedule._steps = [1.0]
    assert schedule.worth(0.0, 1.0, 1e9)
    assert not schedule.worth(1.0, 1.0, 1e9)


def test_it_returns_when_teleports_pay_again() -> None:
    found = simulate(lambda step: 3.0 if step >= 60 else 1.0, cost=2.0)
    assert found[:4] == [0, 10, 30, 70] and found[4:8] == [75, 80, 85, 90]


def test_first_fires_once_or_as_often_as_it_is_told() -> None:
    assert fired(First(tf.Every(3)), [1.0] * 20) == [3]
    assert fired(First(tf.Every(3), count=2), [1.0] * 20) == [3, 6]
    assert fired(First(Plateau(patience=4, smoothing=0.0)), [1.0] * 20) == [4]


@pytest.mark.parametrize("make", [lambda: Plateau(5, smoothing=0.5), lambda: First(Plateau(5, smoothing=0.5), 2), lambda: tf.Every(4)])
def test_a_checkpoint_carries_the_memory(make: Callable[[], Schedule]) -> None:
    norms = [1.0] * 12 + [0.5] * 20
    whole, first, second = make(), make(), make()
    expected = [whole.fires(StepInfo(step, OPTIMIZER, lambda: norm)) for step, norm in enumerate(norms)]  # noqa: B023
    found = [first.fires(StepInfo(step, OPTIMIZER, lambda: norm)) for step, norm in enumerate(norms[:9])]  # noqa: B023
    second.load_state_dict(first.state_dict())
    found += [second.fires(StepInfo(step, OPTIMIZER, lambda: norm)) for step, norm in enumerate(norms[9:], 9)]  # noqa: B023
    assert found == expected and any(expected)


def test_a_memory_of_another_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Every\(3\) has no memory, got \['lowest', 'mean', 'since'\]"):
        tf.Every(3).load_state_dict(Plateau().state_dict())


def training(schedule: Callable[[Callable[[], torch.Tensor]], Schedule]) -> tuple[tf.Teleporter, list[float]]:
    """Forty steps on a deep linear network, teleported by GL of its hidden space."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 3, bias=False)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    loss_fn = lambda: (model(x) - y).square().mean()  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    teleporter = tf.attach(optimizer, tf.find_symmetries(model, x), objective="grad_norm", schedule=schedule(loss_fn), radius=0.2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return teleporter, losses


def test_every_condition_works_around_an_optimizer() -> None:
    _, plain = training(lambda loss_fn: tf.At())
    makes = [
        lambda loss_fn: Plateau(patience=3, threshold=0.2),
        lambda loss_fn: OffEigenvector(loss_fn, threshold=0.01, every=5),
        lambda loss_fn: WorthItsTime(horizon=5),
        lambda loss_fn: First(Plateau(patience=3, threshold=0.2)),
    ]
    for make in makes:
        teleporter, losses = training(make)
        assert 1 <= len(teleporter.history) < 40
        assert teleporter.history[0].objective_after > teleporter.history[0].objective_before
        assert losses[-1] != plain[-1] and losses[-1] < losses[0]
    assert len(teleporter.history) == 1
    assert teleporter.state_dict()["schedule"]["fired"] == 1
    again, _ = training(makes[3])
    again.schedule.fired = 0
    again.load_state_dict(teleporter.state_dict())
    assert again.schedule.fired == 1


def test_schedules_print_as_they_were_written() -> None:
    assert repr(First(Plateau(5, 0.1, 0.5), count=2)) == "First(Plateau(patience=5, threshold=0.1, smoothing=0.5), count=2)"
    assert repr(First(WorthItsTime(7))) == "First(WorthItsTime(horizon=7))"
    assert repr(OffEigenvector(lambda: torch.ones(()), 0.2, 3)) == "OffEigenvector(threshold=0.2, every=3)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Plateau(0), ValueError, "patience must be an integer of at least 1, got 0; 50 is the default"),
        (lambda: Plateau(threshold=1.0), ValueError, r"threshold must be in \[0, 1\), got 1.0"),
        (lambda: Plateau(smoothing=-0.1), ValueError, r"smoothing must be in \[0, 1\), got -0.1"),
        (lambda: OffEigenvector(3), TypeError, "loss_fn must be callable, got int"),  # type: ignore[arg-type]
        (lambda: OffEigenvector(lambda: torch.ones(()), threshold=2), ValueError, "threshold must be in"),
        (lambda: OffEigenvector(lambda: torch.ones(()), every=True), ValueError, "every must be an integer of at least 1, got True"),
        (lambda: WorthItsTime(1.5), ValueError, "horizon must be an integer of at least 1, got 1.5"),  # type: ignore[arg-type]
        (lambda: WorthItsTime(clock=3), TypeError, "clock must be callable, got int"),  # type: ignore[arg-type]
        (lambda: First(3), TypeError, "schedule must be a Schedule, got int"),  # type: ignore[arg-type]
        (lambda: First(tf.Every(2), 0), ValueError, "count must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
