"""The tasks' own promises: starts that are one function, joints of a stack, the command from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.convergence.__main__ import main
from bench.convergence.interface import Trial
from bench.convergence.tasks.digits_mlp import mlp
from bench.convergence.tasks.factorisation import Factorisation, Factors, Problem, start
from bench.convergence.tasks.scaled_start import factors, scale_

QUICK = Problem(condition=10.0, balanced=False, steps=120, rows=12, columns=9, rank=3)


def test_a_badly_scaled_start_is_the_same_function() -> None:
    model, x = mlp().double(), torch.randn(5, 64, dtype=torch.float64)
    before, weights = model(x), [p.detach().clone() for p in model.parameters()]
    moved = [factor.double() for factor in factors(model, 3)]
    scale_(model, moved)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-12)
    assert max(float((p.detach() - w).norm() / w.norm()) for p, w in zip(model.parameters(), weights, strict=True)) > 1
    model[0].weight.data.mul_(moved[0][:, None])
    assert not torch.allclose(model(x), before, rtol=1e-3)


def test_the_unbalanced_factors_have_the_balanced_ones_product() -> None:
    (U, V, M), (A, B, N) = start(QUICK, 4), start(Problem(**{**vars(QUICK), "balanced": True}), 4)
    torch.testing.assert_close(U @ V.mT, A @ B.mT, rtol=1e-9, atol=1e-12)
    assert torch.equal(M, N) and U.norm() / V.norm() > 30 * A.norm() / B.norm()
    values = torch.linalg.svdvals(M)
    assert float(values[0] / values[QUICK.rank - 1]) == pytest.approx(10.0) and float(values[QUICK.rank]) < 1e-12


def test_a_stack_of_factors_is_one_joint_with_a_head_each() -> None:
    stack = Factors(*map(torch.stack, zip(*(start(QUICK, seed) for seed in (0, 1)), strict=True)))
    symmetries, before = stack.symmetries(), (stack.U @ stack.V.mT).detach()
    g = torch.randn(2, 3, 3, dtype=torch.float64)
    symmetries.apply_(stack, {"factors": g})
    torch.testing.assert_close((stack.U @ stack.V.mT).detach(), before, rtol=1e-9, atol=1e-10)
    stack.U.data.copy_(stack.U.data @ g[0].mT)
    assert not torch.allclose((stack.U @ stack.V.mT).detach(), before, rtol=1e-3)


def test_the_invariant_step_is_scaledgd_and_a_stack_trains_each_as_alone() -> None:
    task = Factorisation(QUICK)
    both = {arm: [result.final for result in task.train(Trial(arm, 0.4), (0, 1, 2))] for arm in ("gd+invariant", "scaledgd")}
    assert both["gd+invariant"] == both["scaledgd"] and all(steps < 60 for steps in both["scaledgd"])
    assert [result.final for seed in (0, 1, 2) for result in task.train(Trial("scaledgd", 0.4), (seed,))] == both["scaledgd"]


def test_the_invariant_step_does_not_see_the_factors_scales_and_gradient_descent_does() -> None:
    tasks = [Factorisation(Problem(**{**vars(QUICK), "balanced": balanced})) for balanced in (True, False)]
    invariant = [[result.final for result in task.train(Trial("gd+invariant", 0.4), (0, 1))] for task in tasks]
    assert invariant[0] == invariant[1]
    plain = [[result.measures["relative error"] for result in task.train(Trial("gd", 0.4), (0, 1))] for task in tasks]
    assert all(bad > 1e3 * good for good, bad in zip(*plain, strict=True))


def test_one_balance_saves_gradient_descent_from_an_unbalanced_start() -> None:
    task = Factorisation(Problem(**{**vars(QUICK), "steps": 400}))
    plain, balanced = (next(iter(task.train(Trial(arm, 0.5), (0,)))) for arm in ("gd", "gd+balance-once"))
    assert plain.diverged and not balanced.diverged


def test_tuning_ends_with_the_first_rate_that_gets_there_and_ranks_the_rest_behind_it() -> None:
    task = Factorisation(QUICK)
    trials = [Trial("scaledgd", rate) for rate in (0.01, 0.1, 0.4)]
    by_rate: dict[float, list] = {}
    for trial, result in task.tune(trials, (0, 1)):
        by_rate.setdefault(trial.rate, []).append(result)
    scores = [task.score(by_rate[rate]) for rate in (0.01, 0.1, 0.4)]
    assert scores == sorted(scores, reverse=True) and not by_rate[0.4][0].diverged and by_rate[0.01][0].diverged


def test_a_quick_run_leaves_rows_a_table_numbers_and_a_picture_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    command = ["scaled-start", "--quick", "--arms", "sgd,sgd+good-start,sgd+balance-once", "--shares", "0.5", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "| sgd+balance-once |" in out and "sgd+good-start: " in out
    rows = (tmp_path / "scaled-start.jsonl").read_text().splitlines()
    found = json.loads((tmp_path / "scaled-start.json").read_text())
    assert found["command"].endswith(str(tmp_path)) and set(found["arms"]) == set(command[3].split(","))
    pairs = {(one["arm"], one["reference"]) for one in found["comparisons"]}
    assert pairs == {("sgd", "sgd+good-start"), ("sgd+balance-once", "sgd+good-start"), ("sgd+balance-once", "sgd")}
    assert (tmp_path / "scaled-start.png").stat().st_size > 10_000
    assert main(command) == 0
    assert (tmp_path / "scaled-start.jsonl").read_text().splitlines() == rows


def test_bad_arguments_end_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaled-start", "--quick", "--arms", "sgd+jump", "--out", str(tmp_path)]) == 2
    assert "addition must be one of" in capsys.readouterr().err
    assert main(["nothing", "--out", str(tmp_path)]) == 2
    assert "task must be one of" in capsys.readouterr().err
