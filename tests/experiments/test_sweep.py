"""The sweep: the grid grows at its edges, runs are taken up where they ended, and the recorded one is used."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teleport_fast.experiments import sweep as module
from teleport_fast.experiments.arms import arm_named
from teleport_fast.experiments.sweep import beyond, grid, means, rate_for, recorded, sweep
from teleport_fast.experiments.text import Text
from teleport_fast.experiments.train import Run, Setting

ARM = arm_named("adamw")


class Counting:
    """Stands in for training: the loss is the distance of log(rate) from its best value."""

    def __init__(self, best: float) -> None:
        self.best, self.asked = best, list[tuple[float, int]]()

    def __call__(self, arm: Any, rate: float, seed: int, setting: Setting, *_: Any) -> Run:
        self.asked.append((rate, seed))
        loss = abs(math.log(rate / self.best)) + 0.001 * seed
        return Run(arm.label, rate, seed, setting.steps, [(setting.steps, loss)], [1.0] * setting.steps)


@pytest.fixture
def run_sweep(tiny: Setting, tiny_text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(stub: Any, **changes: Any) -> dict[str, Any]:
        monkeypatch.setattr(module, "train", stub)
        given: dict[str, Any] = {"arms": [ARM], "seeds": (0, 1), "setting": tiny, "folder": tmp_path, **changes}
        return sweep(text=tiny_text, command="made by a test", **given)

    return run


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad", "rmsprop"])
def test_the_grid_has_six_rates_on_a_logarithmic_scale_around_the_usual_one(name: str) -> None:
    arm = arm_named(name)
    rates = grid(arm)
    assert len(rates) == 6
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert all(1.4 < ratio < 1.55 for ratio in ratios)
    assert rates[1] < rate_default(name) < rates[-2]


def rate_default(name: str) -> float:
    return module.BASES[name].rate


def test_the_best_rate_inside_the_grid_is_taken_without_growth(run_sweep: Any) -> None:
    stub = Counting(best=0.002)
    result = run_sweep(stub, rates=(0.001, 0.002, 0.004))
    assert result["rates"]["adamw"]["rate"] == 0.002
    assert len(stub.asked) == 6


@pytest.mark.parametrize(("best", "grown"), [(0.016, [0.008, 0.016, 0.032]), (0.0004, [0.0005, 0.00025])])
def test_the_grid_grows_where_its_edge_is_the_best(run_sweep: Any, best: float, grown: list[float]) -> None:
    stub = Counting(best)
    result = run_sweep(stub, rates=(0.001, 0.002, 0.004))
    assert [rate for rate, seed in stub.asked[6:] if seed == 0] == grown
    assert result["rates"]["adamw"]["at_edge"] is False
    assert result["rates"]["adamw"]["rate"] == (0.016 if best == 0.016 else 0.0005)


def test_growth_has_an_end_and_then_the_edge_is_admitted(run_sweep: Any) -> None:
    result = run_sweep(Counting(best=1e9), rates=(0.001, 0.002, 0.004))
    assert len(result["rates"]["adamw"]["losses"]) == module.MOST_POINTS
    assert result["rates"]["adamw"]["at_edge"] is True


def test_an_ended_sweep_is_taken_up_where_it_was(run_sweep: Any, tmp_path: Path) -> None:
    first = Counting(best=0.002)

    def interrupting(*arguments: Any) -> Run:
        if len(first.asked) == 3:
            raise KeyboardInterrupt
        return first(*arguments)

    stopped = run_sweep(interrupting, rates=(0.001, 0.002, 0.004))
    assert stopped["interrupted"] is True
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 3
    second = Counting(best=0.002)
    result = run_sweep(second, rates=(0.001, 0.002, 0.004))
    assert second.asked == [(0.002, 1), (0.004, 0), (0.004, 1)]
    assert result["rates"]["adamw"]["rate"] == 0.002
    assert len(result["rows"]) == 6


def test_a_run_that_ctrl_c_ended_is_no_row_of_the_sweep(run_sweep: Any, tmp_path: Path) -> None:
    counting = Counting(best=0.002)
    stopped = run_sweep(lambda *given: replace(counting(*given), interrupted=len(counting.asked) == 2), rates=(0.001, 0.002, 0.004))
    assert stopped["interrupted"] is True and len(stopped["rows"]) == 1
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 1


def test_a_sweep_of_nothing_is_refused_and_an_arm_without_runs_has_no_best_rate(run_sweep: Any) -> None:
    for changes in ({"arms": []}, {"seeds": ()}):
        with pytest.raises(ValueError, match=r"arms and seeds must not be empty, got .*; name at least one each"):
            run_sweep(Counting(best=0.002), **changes)
    assert module.chosen([], "adamw", (0,)) is None


def test_rows_of_another_setting_do_not_count(run_sweep: Any, tiny: Setting) -> None:
    run_sweep(Counting(best=0.002), rates=(0.001, 0.002, 0.004))
    again = Counting(best=0.002)
    run_sweep(again, rates=(0.001, 0.002, 0.004), setting=replace(tiny, batch=3))
    assert len(again.asked) == 6


def test_arms_of_one_name_with_other_settings_are_tuned_apart(run_sweep: Any, tmp_path: Path) -> None:
    arms = [arm_named("rotations"), arm_named("rotations:decay=0.8"), arm_named("rotations:every=1")]
    stub = Counting(best=0.002)
    result = run_sweep(stub, arms=arms, rates=(0.001, 0.002, 0.004))
    assert list(result["rates"]) == ["adamw + rotations", "adamw + rotations, decay 0.8", "adamw + rotations, every 1"]
    assert len(stub.asked) == 18
    again = Counting(best=0.002)
    run_sweep(again, arms=arms[1:], rates=(0.001, 0.002, 0.004))
    assert again.asked == []


def test_rows_from_before_a_field_existed_count(run_sweep: Any, tmp_path: Path) -> None:
    run_sweep(Counting(best=0.002), rates=(0.001, 0.002, 0.004))
    path = tmp_path / "sweep.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert row["options"].pop("settings") == []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = Counting(best=0.002)
    run_sweep(again, rates=(0.001, 0.002, 0.004))
    assert again.asked == []


def test_a_diverged_rate_is_never_the_best(run_sweep: Any) -> None:
    stub = Counting(best=0.004)

    def diverging(arm: Any, rate: float, *rest: Any) -> Run:
        run = stub(arm, rate, *rest)
        run.diverged = rate > 0.003
        return run

    result = run_sweep(diverging, rates=(0.001, 0.002, 0.004))
    assert result["rates"]["adamw"]["rate"] == 0.002
    assert result["rates"]["adamw"]["losses"][-1] == [0.004, None]


def test_a_mean_needs_every_seed() -> None:
    row = {"arm": "adamw", "rate": 0.1, "diverged": False}
    rows = [{**row, "seed": 0, "validation": [[5, 2.0]]}, {**row, "seed": 1, "validation": [[5, 4.0]]}]
    assert means(rows, "adamw", (0, 1)) == {0.1: 3.0}
    assert means(rows[:1], "adamw", (0, 1)) == {}


def test_a_grid_of_one_rate_grows_too() -> None:
    assert beyond([0.2], 0.2) == 0.3


def test_a_rate_that_is_not_positive_is_refused(run_sweep: Any) -> None:
    with pytest.raises(ValueError, match=r"rates must be positive, got -0.1; pass"):
        run_sweep(Counting(0.1), rates=(0.1, -0.1))


def test_a_damaged_file_is_named(run_sweep: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").write_text('{"half": \n')
    with pytest.raises(ValueError, match=r"sweep.jsonl must hold one JSON object per line"):
        run_sweep(Counting(0.1), rates=(0.1,))


def test_the_recorded_sweep_is_complete_and_names_its_command() -> None:
    record = recorded()
    assert record["command"].startswith("python -m teleport_fast train --sweep")
    assert record["interrupted"] is False
    assert Setting(**{**record["setting"], "model": Setting().model}) == Setting()
    for label in ("adamw", "adamw + rotations", "adamw + random"):
        best = record["rates"][label]
        assert best["at_edge"] is False
        assert len(best["losses"]) >= 6
        assert best["loss"] == min(loss for _, loss in best["losses"] if loss is not None)
        assert means(record["rows"], label, record["seeds"])[best["rate"]] == pytest.approx(best["loss"])


def test_train_uses_the_recorded_rates_and_says_where_a_rate_comes_from() -> None:
    record = recorded()
    for name in ("adamw", "rotations", "random"):
        arm = arm_named(name)
        assert rate_for(arm) == (record["rates"][arm.label]["rate"], "recorded sweep")
    assert rate_for(arm_named("balance")) == (record["rates"]["adamw"]["rate"], "recorded sweep of adamw")
    rate, origin = rate_for(arm_named("sgd"))
    assert rate == module.BASES["sgd"].rate
    assert "--sweep --arms sgd" in origin


def test_every_row_is_a_json_object_with_its_command(run_sweep: Any, tmp_path: Path) -> None:
    run_sweep(Counting(best=0.002), rates=(0.001, 0.002, 0.004))
    parsed = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert {row["command"] for row in parsed} == {"made by a test"}
    assert [(row["rate"], row["seed"]) for row in parsed[:2]] == [(0.001, 0), (0.001, 1)]
