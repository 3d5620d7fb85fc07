"""A stack of networks trains each one as it would alone, whatever the others do."""

from __future__ import annotations

import itertools
import math

import pytest

from bench.convergence.interface import Trial
from bench.convergence.network import Digits, Work
from bench.convergence.tasks.digits_cnn import cnn
from bench.convergence.tasks.digits_mlp import mlp

pytest.importorskip("sklearn")
ELEMENTWISE = (
    "sgd", "momentum+clip", "adagrad", "rmsprop", "adamw+reset", "momentum+balance-once", "sgd+balance-every", "adamw+grad-norm",
    "momentum+grad-l1",
)


def task(build: object = mlp, shape: tuple[int, ...] = (64,), steps: int = 7) -> Digits:
    return Digits("stacked", build, shape, Work(steps, 20, 100), ("adamw",))  # type: ignore[arg-type]


@pytest.mark.parametrize("arm", ELEMENTWISE)
def test_a_network_of_a_stack_trains_as_alone(arm: str) -> None:
    digits = task()
    rate = digits.space(arm).rates[2]
    trials = [Trial(arm, r, digits.space(arm).choices[-1]) for r in (rate, 2 * rate)]
    stacked = {(trial.rate, result.seed): result for trial, result in digits.tune(trials, (0, 5))}
    alone = {(trial.rate, seed): digits.train_one(trial, seed) for trial in trials for seed in (0, 5)}
    assert {key: one.final for key, one in stacked.items()} == pytest.approx({key: one.final for key, one in alone.items()}, rel=1e-4)
    # the control: another rate and another seed are told apart by far more than that
    finals = sorted(result.final for result in alone.values())
    assert min(b / a for a, b in itertools.pairwise(finals)) > 1 + 3e-4
    assert stacked[rate, 5].measures["test loss"] == pytest.approx(alone[rate, 5].measures["test loss"], rel=1e-4)


def test_convolutions_and_their_joints_stack_too() -> None:
    digits = task(cnn, (1, 8, 8), 5)
    trial = Trial("momentum+balance-every", 0.05, {"momentum": 0.9})
    (_, stacked), *_ = digits.tune([trial], (3,))
    alone = digits.train_one(trial, 3)
    assert stacked.final == pytest.approx(alone.final, rel=1e-5)
    plain = digits.train_one(Trial("momentum", 0.05, {"momentum": 0.9}), 3)
    assert abs(plain.final / alone.final - 1) > 1e-4


def test_a_network_that_diverges_leaves_the_others_alone() -> None:
    digits = task()
    trials = [Trial("sgd+grad-norm", rate, {"radius": 0.05}) for rate in (0.1, 1e30)]
    results = {trial.rate: result for trial, result in digits.tune(trials, (0,))}
    assert results[1e30].diverged and math.isinf(results[1e30].final)
    assert results[0.1].final == pytest.approx(digits.train_one(trials[0], 0).final, rel=1e-4)


def test_a_curve_ends_with_the_final_loss() -> None:
    digits = task(steps=30)
    (result,) = digits.train(Trial("sgd", 0.1), (0,))
    alone = digits.train_one(Trial("sgd", 0.1), 0)
    assert [step for step, _ in result.curve] == [step for step, _ in alone.curve]
    assert result.curve[-1] == (30, result.final) and len(result.curve) == 20


def test_a_shorter_run_is_a_whole_schedule() -> None:
    digits = task(steps=20)
    (half,) = digits.train(Trial("sgd", 0.3, {}, share=0.5), (0,))
    (whole,) = digits.train(Trial("sgd", 0.3), (0,))
    assert half.curve[-1][0] == 10
    assert half.final != pytest.approx(dict(whole.curve)[10], rel=1e-3)
