"""The comparison: paired order, early ends that keep what was measured, and the numbers of its table."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from teleport_fast.experiments import compare as module
from teleport_fast.experiments.arms import arm_named
from teleport_fast.experiments.compare import Comparison, Entry, Silent, compare, jobs
from teleport_fast.experiments.summary import function_kept, measured, rows, steps_to_reach
from teleport_fast.experiments.text import Text
from teleport_fast.experiments.train import Run, Setting

PLAIN, TURNED = arm_named("adamw"), arm_named("rotations")


def entries(*seeds: int) -> list[Entry]:
    return [Entry(PLAIN, 0.003, seeds), Entry(TURNED, 0.004, seeds)]


def finished(arm: str, seed: int, losses: list[float], **fields: object) -> Run:
    """A complete run of 30 steps with three validations."""
    run = Run(arm, 0.003, seed, 30, [(10 * i + 10, loss) for i, loss in enumerate(losses)], [1.0] * 30)
    for name, value in fields.items():
        setattr(run, name, value)
    return run


def table_of(*runs: Run) -> dict[str, object]:
    return {row.arm: row for row in rows(Comparison(tuple(entries(0, 1)), Setting(steps=30), list(runs)))}


def test_runs_go_seed_by_seed_so_that_an_early_end_leaves_pairs_and_a_control_of_fewer_seeds_is_last() -> None:
    control = Entry(arm_named("random"), 0.003, (0,))
    order = [(entry.arm.name, seed) for entry, seed in jobs([*entries(0, 1), control])]
    assert order == [("adamw", 0), ("rotations", 0), ("adamw", 1), ("rotations", 1), ("random", 0)]


def test_every_arm_and_seed_is_run_once(tiny: Setting, tiny_text: Text) -> None:
    comparison = compare(entries(0, 1), tiny, tiny_text)
    assert [(run.arm, run.seed) for run in comparison.runs] == [
        ("adamw", 0),
        ("adamw + rotations", 0),
        ("adamw", 1),
        ("adamw + rotations", 1),
    ]
    assert all(run.complete for run in comparison.runs)
    assert function_kept(comparison)
    assert not comparison.interrupted


class StopAt(Silent):
    """Presses Ctrl-C at a step of a run."""

    def __init__(self, arm: str, step: int) -> None:
        self.arm, self.at = arm, step

    def step(self, run: Run) -> None:
        if (run.arm, len(run.losses)) == (self.arm, self.at):
            raise KeyboardInterrupt


def test_control_c_ends_the_comparison_and_keeps_what_was_measured(tiny: Setting, tiny_text: Text) -> None:
    comparison = compare(entries(0, 1), tiny, tiny_text, StopAt("adamw + rotations", 4))
    assert comparison.interrupted
    assert [len(run.losses) for run in comparison.runs] == [6, 4]
    plain, turned = rows(comparison)
    assert (plain.step, turned.step) == (6, 3)
    assert math.isnan(turned.gain[0])


def test_a_run_that_does_not_fit_into_the_time_is_left_out_by_name(
    tiny: Setting, tiny_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 50.0, 100.0, 100.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    taken = replace(tiny, steps=30)
    monkeypatch.setattr(module, "train", lambda arm, *rest: finished(arm.label, rest[1], [3.0], seconds=50.0))
    comparison = compare(entries(0, 1), taken, tiny_text, minutes=2)
    assert len(comparison.runs) == 2
    assert comparison.skipped[0] == "adamw, seed 1: a run takes up to 50 s and 20 s of the 2 minutes are left"
    assert len(comparison.skipped) == 2


def test_the_same_arm_twice_is_refused(tiny: Setting, tiny_text: Text) -> None:
    with pytest.raises(ValueError, match=r"each once, got \['adamw', 'adamw'\]; drop"):
        compare([entries(0)[0]] * 2, tiny, tiny_text)


def test_gain_and_steps_are_paired_by_seed() -> None:
    found = table_of(
        finished("adamw", 0, [4.0, 3.0, 2.0]),
        finished("adamw", 1, [5.0, 4.0, 3.0]),
        finished("adamw + rotations", 0, [3.0, 2.0, 1.0]),
        finished("adamw + rotations", 1, [4.0, 2.0, 1.5]),
    )
    plain, turned = found["adamw"], found["adamw + rotations"]
    assert plain.loss == (2.5, pytest.approx(0.7071, rel=1e-3))
    assert turned.gain == (1.25, pytest.approx(0.3536, rel=1e-3))
    assert turned.reach == (17.5, pytest.approx(3.536, rel=1e-3))
    assert (turned.reached, turned.paired, turned.seeds) == (2, 2, 2)


def test_overhead_is_the_optimizer_time_above_the_baselines_as_a_share_of_its_step() -> None:
    found = table_of(
        finished("adamw", 0, [3.0, 2.0, 1.0], step_ms=50.0, optimizer_ms=5.0),
        finished("adamw + rotations", 0, [3.0, 2.0, 1.0], step_ms=80.0, optimizer_ms=15.0),
    )
    assert found["adamw + rotations"].overhead_ms == 10
    assert found["adamw + rotations"].overhead_percent == 20
    assert found["adamw"].overhead_ms == 0


def test_an_arm_that_never_gets_there_has_no_steps_to_reach() -> None:
    found = table_of(finished("adamw", 0, [3.0, 2.0, 1.0]), finished("adamw + rotations", 0, [3.0, 2.5, 1.1]))
    assert found["adamw + rotations"].reached == 0
    assert math.isnan(found["adamw + rotations"].reach[0])


def test_a_diverged_run_makes_the_arms_mean_infinite_and_is_in_no_pair() -> None:
    broken = finished("adamw + rotations", 0, [9.0], diverged=True)
    broken.losses = broken.losses[:12]
    row = table_of(finished("adamw", 0, [3.0, 2.0, 1.0]), broken)["adamw + rotations"]
    assert row.loss[0] == math.inf
    assert row.paired == 0


def test_complete_runs_outrank_an_interrupted_one() -> None:
    whole, part = finished("adamw", 0, [3.0, 2.0, 1.0]), finished("adamw", 1, [3.0], interrupted=True)
    assert measured([whole, part]) == [whole]
    assert measured([part]) == [part]


def test_a_moved_function_is_noticed() -> None:
    runs = [finished("adamw", 0, [3.0]), finished("adamw + rotations", 0, [3.0], deviations=[1e-7, 2e-4])]
    assert not function_kept(Comparison(tuple(entries(0)), Setting(steps=30), runs))


@pytest.mark.parametrize(("loss", "step"), [(3.0, 10.0), (2.5, 15.0), (2.0, 20.0), (3.5, 10.0)])
def test_steps_to_reach_a_loss_are_interpolated(loss: float, step: float) -> None:
    assert steps_to_reach([(10, 3.0), (20, 2.0), (30, 2.5)], loss) == step
