"""The studies of sharpness, curvature and correlation: their training, statistics and arms, and that they say what they measured."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn", reason="digits come with scikit-learn: pip install scikit-learn")

from teleport_fast.experiments.studies import correlation, curvature, sharpness
from teleport_fast.experiments.studies.arms_at_minima import (
    compare,
    curvature_drawn,
    difference,
    lower,
    sharpness_drawn,
    shown,
    twenty,
)
from teleport_fast.experiments.studies.pearson import correlate
from teleport_fast.experiments.studies.study import Options, Outcome
from teleport_fast.experiments.studies.trained import Arm, Data, data_of, start, train, train_many


def small() -> Data:
    """A hundred digits."""
    data = data_of(Options())
    return Data("digits", data.X[:, :100], data.labels[:100], data.X_test[:, :50], data.labels_test[:50], 10)


def test_inputs_are_standardised_by_the_training_split() -> None:
    data = data_of(Options())
    assert data.X.shape == (64, 1400) and data.X_test.shape == (64, 397)
    assert abs(float(data.X.mean())) < 1e-12 and float(data.X.std(correction=0)) == pytest.approx(1)
    assert abs(float(data.X_test.mean())) > 1e-6


def test_training_is_sgd_on_the_mean_cross_entropy() -> None:
    data = small()
    weights = start(data, 3)
    layers = [torch.nn.Linear(W.shape[1], W.shape[0], bias=False).double() for W in weights]
    model = torch.nn.Sequential(layers[0], torch.nn.LeakyReLU(0.1), layers[1], torch.nn.LeakyReLU(0.1), layers[2])
    with torch.no_grad():
        for layer, W in zip(layers, weights, strict=True):
            layer.weight.copy_(W)
    assert torch.nn.functional.cross_entropy(model(data.X.mT), data.labels).item() == pytest.approx(data.train(weights), rel=1e-12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for index in torch.randperm(100, generator=torch.Generator().manual_seed(4)).split(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.X[:, index].mT), data.labels[index]).backward()
        optimizer.step()
    end = train(data, weights, 1, 4, rate=0.05)
    for layer, W in zip(layers, end, strict=True):
        torch.testing.assert_close(layer.weight.detach(), W)
    assert data.train(end) < data.train(weights) and 0 <= data.accuracy(end) <= 1


def test_many_networks_train_side_by_side_as_one_by_one() -> None:
    data = small()
    networks = [start(data, seed) for seed in range(3)]
    rates = [0.01, 0.05, 0.1]
    together = train_many(data, networks, 2, [7, 8, 9], rates, 30)
    for k, found in enumerate(together):
        for W, V in zip(found, train(data, networks[k], 2, 7 + k, rates[k], 30), strict=True):
            torch.testing.assert_close(W, V)
    other = train(data, networks[0], 2, 7, 0.02, 30)
    assert not torch.allclose(other[0], together[0][0])


def test_r_is_numpys_and_its_interval_covers() -> None:
    numpy = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for run in range(60):
        x = torch.randn(40, generator=generator, dtype=torch.float64)
        y = 0.6 * x + 0.8 * torch.randn(40, generator=generator, dtype=torch.float64)
        found = correlate(x.tolist(), y.tolist(), draws=1000, seed=run)
        assert found.r == pytest.approx(numpy.corrcoef(x, y)[0, 1], rel=1e-12)
        hits += found.low <= 0.6 <= found.high
    assert 50 <= hits <= 60
    z = torch.randn(200, generator=generator, dtype=torch.float64)
    x, y = z + torch.randn(200, generator=generator), z + torch.randn(200, generator=generator)
    left = [side - numpy.polyval(numpy.polyfit(z, side, 1), z) for side in (x.numpy(), y.numpy())]
    partial = correlate(x.tolist(), y.tolist(), z.tolist())
    assert partial.r == pytest.approx(numpy.corrcoef(*left)[0, 1], rel=1e-9) and partial.low < 0 < partial.high
    assert correlate(x.tolist(), y.tolist()).low > 0.2
    independent = correlate(list(range(40)), torch.randn(40, generator=generator).tolist())
    assert independent.low < 0 < independent.high


def test_values_without_a_correlation_are_refused() -> None:
    for x, y, message in (
        ([1, 2, 3], [1, 2, 3], r"at least 4, got \[3, 3\]"),
        ([1, 2, 3, 4], [1, 2, 3], r"got \[4, 3\]"),
        ([1, 2, 3, math.nan], [1, 2, 3, 4], "x, y and given must be finite"),
        ([1, 2, 3, 4], [2, 2, 2, 2], "x, y and given must vary"),
    ):
        with pytest.raises(ValueError, match=message):
            correlate(x, y)


def arm(test: float) -> Arm:
    return Arm((1.0, test), (1.0, test), 0.5, 0.0, 1.0, 0.0)


def test_a_lower_loss_is_claimed_only_beyond_the_paired_interval() -> None:
    plain = [arm(value) for value in (1.0, 2.0, 3.0, 4.0)]
    results = {
        "plain": plain, "clear": [arm(value - 0.1 - 0.01 * k) for k, value in enumerate((1.0, 2.0, 3.0, 4.0))],
        "noise": [arm(value + shift) for value, shift in zip((1.0, 2.0, 3.0, 4.0), (0.1, -0.1, 0.1, -0.12), strict=True)],
        "lost": [arm(math.nan)] * 4,
    }
    assert lower(results, "clear", "").holds and not lower(results, "clear", "", sign=1).holds
    assert not lower(results, "noise", "").holds and not lower(results, "lost", "").holds
    assert difference(results, "clear").mean == pytest.approx(-0.115)
    assert "diverged (4 of 4)" in lower(results, "lost", "").measured


def test_arms_start_from_the_same_weights_and_say_what_the_teleport_cost() -> None:
    def arms(data: Data, seed: int) -> dict[str, object]:
        return {"plain": None, "again": lambda weights: weights, "spoilt": lambda weights: [W.flip(0) for W in weights]}

    data, results, before = compare(Options(seeds=(0, 1)), arms, curvature_drawn, 2, 1)  # type: ignore[arg-type]
    for plain, again, spoilt, value in zip(*results.values(), before.values, strict=True):
        assert plain.test == again.test and plain.jump == again.jump == 0 and plain.measure == value
        assert abs(spoilt.jump) > 1e-3 and spoilt.test[0] != plain.test[0]
    tables, panels = shown(results, before, "curvature", "title")
    assert [len(table.rows) for table in tables] == [3, 3] and len(panels) == 2
    assert data.name == "digits"


@pytest.mark.parametrize(("name", "drawn"), [("sharpness", sharpness_drawn), ("curvature", curvature_drawn)])
def test_the_bar_of_the_issue_holds_on_trained_networks(name: str, drawn: object) -> None:
    _, claims = twenty(Options(quick=True), data_of(Options()), name, drawn)  # type: ignore[arg-type]
    assert len(claims) == 2 and all(claim.holds for claim in claims)


def test_weights_that_left_the_numbers_are_reported_as_diverged() -> None:
    def arms(data: Data, seed: int) -> dict[str, object]:
        return {"plain": None, "nan": lambda weights: [W * math.nan for W in weights], "huge": lambda weights: [W * 1e200 for W in weights]}

    _, results, before = compare(Options(seeds=(0,)), arms, curvature_drawn, 2, 1)  # type: ignore[arg-type]
    assert math.isfinite(before.mean) and results["nan"][0].measure == math.inf
    (at, end), _ = shown(results, before, "curvature", "title")
    assert str(at.rows[1][1]) == str(end.rows[1][2]) == "diverged (1 of 1)" and "diverged" in str(end.rows[1][3])
    assert not lower(results, "nan", "").holds and not lower(results, "huge", "").holds


def check(outcome: Outcome, tables: int, arms: int) -> None:
    assert len(outcome.tables) == tables and len(outcome.tables[0].rows) == arms
    assert all(claim.measured and claim.bar for claim in outcome.claims)


@pytest.mark.parametrize(("module", "arms"), [(sharpness, 7), (curvature, 9)])
def test_the_teleport_studies_run_and_keep_the_loss_where_they_say_so(
    module: object, arms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teleport_fast.experiments.studies import arms_at_minima

    monkeypatch.setattr(arms_at_minima, "QUICK_EPOCHS", 2)
    monkeypatch.setattr(arms_at_minima, "QUICK_AT", 1)
    monkeypatch.setattr(arms_at_minima, "QUICK_RUNS", 1)
    outcome = module.run(Options(quick=True, seeds=(0, 1)))  # type: ignore[attr-defined]
    check(outcome, 3, arms)
    kept = [claim for claim in outcome.claims if "keep the training loss" in claim.text]
    assert len(kept) == 1 and kept[0].holds


def test_the_correlation_study_reports_both_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlation, "QUICK_EPOCHS", 1)
    outcome = correlation.run(Options(quick=True, seeds=tuple(range(5))))
    check(outcome, 2, 7)
    assert len(outcome.claims) == 10 and len(outcome.panels) == 4
    assert all(len(curve.x) == len(curve.runs[0]) == 5 for panel in outcome.panels for curve in panel.curves)
