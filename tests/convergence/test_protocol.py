"""The protocol: equal budgets, grids that grow, pairing by seed, and rows that are taken up again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.convergence.interface import RATES, TRIALS, Result, Space, Trial
from bench.convergence.protocol import GROWTH, compare, run, tune
from bench.convergence.store import Store

TUNING, SEEDS = (100, 101), (0, 1, 2, 3, 4)


def store_of(toy: Any, folder: Path) -> Store:
    return Store(folder / "toy.jsonl", toy)


def test_arms_have_the_same_number_of_first_trials_whatever_they_tune(toy: Any, tmp_path: Path) -> None:
    tuned = [tune(toy, arm, store_of(toy, tmp_path), TUNING) for arm in ("plain", "other")]
    assert [one.trials for one in tuned] == [TRIALS, TRIALS]
    assert [len(one.by_rate) for one in tuned] == [TRIALS, TRIALS // 2]
    assert all(len(one.by_rate) >= RATES and not one.at_edge for one in tuned)


@pytest.mark.parametrize(("best", "side"), [(0.2, "above"), (0.0002, "below")])
def test_the_grid_grows_until_the_best_rate_lies_inside(toy: Any, tmp_path: Path, best: float, side: str) -> None:
    toy.best = {"plain": best}
    tuned = tune(toy, "plain", store_of(toy, tmp_path), TUNING)
    rates = sorted(tuned.by_rate)
    assert not tuned.at_edge and rates[0] < tuned.trial.rate < rates[-1]
    assert abs(math.log2(tuned.trial.rate / best)) < 0.2
    assert (rates[-1] > 0.032) == (side == "above") and (rates[0] < 0.001) == (side == "below")


def test_growth_has_an_end_that_is_admitted(toy: Any, tmp_path: Path) -> None:
    toy.best = {"plain": 1e12}
    tuned = tune(toy, "plain", store_of(toy, tmp_path), TUNING)
    assert tuned.at_edge and tuned.trials == TRIALS + GROWTH


def test_a_grid_never_grows_upwards_into_divergence(toy: Any, tmp_path: Path) -> None:
    toy.gain = {"plain": -math.inf}
    tuned = tune(toy, "plain", store_of(toy, tmp_path), TUNING)
    assert math.isinf(tuned.score) and max(tuned.by_rate) <= 0.032


def test_a_run_that_diverged_on_one_seed_is_not_chosen(toy: Any, tmp_path: Path) -> None:
    plain = toy.train

    def diverging(trial: Trial, seeds: Sequence[int]) -> Iterator[Result]:
        for result in plain(trial, seeds):
            if trial.rate > 0.003 and result.seed == 101:
                result.final = math.inf
            yield result

    toy.train = diverging
    assert 0.002 < tune(toy, "plain", store_of(toy, tmp_path), TUNING).trial.rate < 0.003


def test_paired_seeds_are_trained_at_the_best_trial_and_none_was_tuned_on(toy: Any, tmp_path: Path) -> None:
    outcome = run(toy, toy.arms, store_of(toy, tmp_path), SEEDS, TUNING)
    assert {seed for _, _, seed in toy.asked} == {*TUNING, *SEEDS}
    for arm in toy.arms:
        best = outcome.tuned[arm].trial.rate
        assert {rate for name, rate, seed in toy.asked if name == arm and seed in SEEDS} <= {best, outcome.tuned["plain"].trial.rate}
        assert [result.seed for result in outcome.results[arm]] == list(SEEDS)
    with pytest.raises(ValueError, match=r"seeds must not be tuned on, got \[1\]"):
        run(toy, toy.arms, store_of(toy, tmp_path), SEEDS, (1, 100))


def test_every_arm_is_compared_with_the_baseline_and_its_own_optimizer(toy: Any, tmp_path: Path) -> None:
    outcome = run(toy, toy.arms, store_of(toy, tmp_path), SEEDS, TUNING, shares=(0.5,))
    pairs = {(one.arm, one.reference): one for one in outcome.comparisons}
    assert set(pairs) == {("plain+better", "plain"), ("other", "plain")}
    better = pairs["plain+better", "plain"]
    assert better.loss.high < 0 and better.loss.p < 1e-3 and better.loss.below()
    assert better.loss.mean == pytest.approx(-0.25, abs=0.02)
    assert 0 < better.steps < 1 and better.time == pytest.approx(better.steps) and better.reached == 5
    assert set(outcome.untuned) == {("plain+better", "plain")}
    assert set(outcome.shorter) == {(arm, 0.5) for arm in toy.arms}


def test_a_worse_arm_is_not_called_better(toy: Any, tmp_path: Path) -> None:
    toy.gain = {**toy.gain, "plain+better": -0.25}
    outcome = run(toy, toy.arms, store_of(toy, tmp_path), SEEDS, TUNING)
    worse = next(one for one in outcome.comparisons if one.arm == "plain+better")
    assert worse.loss.low > 0 and worse.loss.p < 1e-3 and not worse.loss.below() and worse.reached == 0


def test_an_ended_run_is_taken_up_where_it_was(toy: Any, tmp_path: Path) -> None:
    plain = toy.train

    def interrupted(trial: Trial, seeds: Sequence[int]) -> Iterator[Result]:
        for result in plain(trial, seeds):
            if len(toy.asked) == 9:
                raise KeyboardInterrupt
            yield result

    toy.train = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(toy, toy.arms, store_of(toy, tmp_path), SEEDS, TUNING)
    kept = len((tmp_path / "toy.jsonl").read_text().splitlines())
    assert kept == 8
    toy.train = plain
    toy.asked.clear()
    first = run(toy, toy.arms, store_of(toy, tmp_path), SEEDS, TUNING)
    again = len(toy.asked)
    toy.asked.clear()
    second = run(toy, toy.arms, store_of(toy, tmp_path), SEEDS, TUNING)
    assert toy.asked == [] and again + kept == len((tmp_path / "toy.jsonl").read_text().splitlines())
    assert [one.loss.mean for one in first.comparisons] == pytest.approx([one.loss.mean for one in second.comparisons], rel=1e-3)


def test_rows_of_another_setting_and_of_another_option_do_not_count(toy: Any, tmp_path: Path) -> None:
    store, trial = store_of(toy, tmp_path), Trial("other", 0.004, {"bonus": 0.0})
    store.add(trial, Result(0, 1.0))
    assert store.get(trial, 0) == Result(0, 1.0)
    assert store.get(Trial("other", 0.004, {"bonus": 0.05}), 0) is None
    assert store.get(Trial("other", 0.004, {"bonus": 0.0}, share=0.5), 0) is None
    toy.steps = 11
    assert store_of(toy, tmp_path).get(trial, 0) is None


def test_divergence_survives_the_file(toy: Any, tmp_path: Path) -> None:
    store, trial = store_of(toy, tmp_path), Trial("plain", 0.004)
    store.add(trial, Result(3, math.inf, [(5, math.inf)], {"test loss": math.nan}))
    read = store_of(toy, tmp_path).get(trial, 3)
    assert read is not None and read.diverged and read.curve == [(5, math.inf)]
    assert json.loads((tmp_path / "toy.jsonl").read_text())["final"] is None


def test_a_damaged_file_is_named_with_its_line(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "toy.jsonl").write_text('{"half": \n')
    with pytest.raises(ValueError, match=r"toy.jsonl must hold one JSON object a line, got .* in line 1"):
        store_of(toy, tmp_path)


def test_other_seeds_are_never_paired() -> None:
    with pytest.raises(ValueError, match=r"a and b must run the same seeds, got \[0\] and \[1\]"):
        compare("a", "b", [Result(0, 1.0)], [Result(1, 1.0)], "difference", {})


def test_a_task_that_forgets_a_seed_is_told(toy: Any, tmp_path: Path) -> None:
    toy.train = lambda trial, seeds: iter(())
    with pytest.raises(RuntimeError, match=r"task toy gave no result for seed 100"):
        tune(toy, "plain", store_of(toy, tmp_path), TUNING)


def test_a_space_must_be_worth_the_budget() -> None:
    with pytest.raises(ValueError, match=r"rates must be at least 6 positive rates in rising order"):
        Space((0.1, 0.2))
    with pytest.raises(ValueError, match=r"choices must be 1 to 3 dicts, got 4"):
        Space.around(0.1, ({},) * 4)
