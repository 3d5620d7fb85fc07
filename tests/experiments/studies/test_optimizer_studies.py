"""The two optimizer studies: every arm is there, exact teleports keep the loss, published ones do not, the guard refuses."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path

import pytest
import torch

from teleport_fast.experiments.datasets import Images, Split, idx
from teleport_fast.experiments.optimizer_arms import Arm, Move, Setting, teleport, train
from teleport_fast.experiments.studies import convergence, mlp
from teleport_fast.experiments.studies.study import Options, Outcome, Sample

pytest.importorskip("sklearn", reason="digits come with scikit-learn: pip install scikit-learn")


@pytest.fixture(scope="module")
def converged() -> Outcome:
    torch.set_num_threads(1)
    return convergence.run(Options(quick=True, seeds=(0,)))


@pytest.fixture(scope="module")
def regressed() -> Outcome:
    torch.set_num_threads(1)
    return mlp.run(Options(quick=True, seeds=(0, 1)))


def clusters(count: int = 200) -> Images:
    """Ten well separated classes of 12 pixels."""
    labels = torch.arange(count) % 10
    centres = torch.randint(0, 256, (10, 12))
    pixels = (centres[labels] + torch.randint(-20, 21, (count, 12))).clamp(0, 255).to(torch.uint8)
    return Images("clusters", Split(pixels, labels), Split(pixels[:50], labels[:50]))


def test_every_optimizer_of_the_quick_study_has_every_arm(converged: Outcome) -> None:
    names = [row[0] for row in converged.tables[0].rows]
    assert names == [
        f"{optimizer}, {arm.name}" for optimizer in convergence.QUICK_OPTIMIZERS for arm in convergence.arms(0.1, (64, 64, 64, 10))
    ]
    losses = [row[2] for row in converged.tables[0].rows]
    assert all(isinstance(loss, Sample) and 0 < loss.mean < 3 for loss in losses)
    assert len({loss.values for loss in losses if isinstance(loss, Sample)}) == len(losses)
    assert {panel.title for panel in converged.panels} == {f"digits, {name}" for name in convergence.QUICK_OPTIMIZERS}
    assert any("reset only" in claim.text for claim in converged.claims)


def test_regressions_exact_teleport_keeps_the_loss_and_the_published_one_does_not(regressed: Outcome) -> None:
    changes = {row[0]: row[3] for row in regressed.tables[0].rows}
    for name, change in changes.items():
        if isinstance(change, Sample):
            large = max(map(abs, change.values))
            assert large > 1 if "published" in str(name) else large < 1e-8
    assert changes["SGD, plain"] == changes["AdaGrad, reset only"] == "–"
    rises = {row[0]: row[4] for row in regressed.tables[0].rows}
    assert isinstance(rises["SGD, teleport"], float) and 1 < rises["SGD, teleport"] <= mlp.RISE * (1 + 1e-9)


def test_a_regression_falls_further_after_an_exact_teleport_than_without(regressed: Outcome) -> None:
    ends = {row[0]: row[2] for row in regressed.tables[0].rows}
    plain, moved = ends["SGD, plain"], ends["SGD, teleport"]
    assert isinstance(plain, Sample) and isinstance(moved, Sample)
    assert all(after < before for before, after in zip(plain.values, moved.values, strict=True))


def test_arms_differ_by_what_they_say_alone() -> None:
    images, setting = clusters(), Setting((12, 12, 12, 10), "momentum", 0.05, 3, 1, teleports=2)
    ours = Move("u_exact", 6, 2, 0.1, check=True)
    plain, kept = (train(images, setting, arm, (0, 1)) for arm in (Arm("a", None, "keep"), Arm("b", None, "keep")))
    assert torch.equal(plain.epochs[-1], kept.epochs[-1])
    reset, moved, carried = (
        train(images, setting, arm, (0, 1)) for arm in (Arm("r", None, "reset"), Arm("t", ours, "reset"), Arm("c", ours, "carry"))
    )
    assert all(torch.equal(other.epochs[0], plain.epochs[0]) for other in (reset, moved, carried))
    ends = [run.epochs[-1] for run in (plain, reset, moved, carried)]
    assert all(not torch.equal(a, b) for index, a in enumerate(ends) for b in ends[:index])
    assert len(moved.reports) == 4 and all(report.exact for report in moved.reports) and not plain.reports


def test_samples_beyond_the_inputs_rank_are_left_out() -> None:
    images = clusters()
    X, labels = images.inputs(images.train).mT.clone(), images.train.labels
    X[4:] = 0
    run = train(images, Setting((12, 12, 12, 10), "momentum", 0.05, 1, 99), Arm("plain", None, "keep"), (0,))
    optimizer = torch.optim.SGD(run.stack.weights, 0.1, momentum=0.9)
    run.stack.cross_entropy(X, labels).sum().backward()
    optimizer.step()
    (report,) = teleport(run.stack, 0, X, labels, Arm("c", Move("u_exact", 9, 2, 0.1), "carry"), torch.Generator().manual_seed(0), optimizer)
    assert report.batch <= 4 and report.exact


def test_a_late_teleport_on_a_few_samples_is_undone_where_the_full_loss_doubles() -> None:
    images, setting = clusters(), Setting((12, 12, 12, 10), "Adam", 0.01, 15, 99)
    run = train(images, setting, Arm("plain", None, "keep"), (0,))
    X, labels = images.inputs(images.train).mT, images.train.labels
    before = run.train_loss.item()
    assert before < 0.3
    losses = {}
    for check in (False, True):
        kept = [weight.clone() for weight in run.stack.of(0)]
        arm = Arm("published", Move("v_exact", 8, 1, 50.0, cap=math.inf, parity=True, check=check), "reset")
        (report,) = teleport(run.stack, 0, X, labels, arm, torch.Generator().manual_seed(0))
        losses[check] = run.stack.cross_entropy(X, labels).item()
        assert report.undone is check
        run.stack.write_(0, kept)
    assert losses[True] == pytest.approx(before) and losses[False] > 2 * before


def test_data_sets_in_a_folder_take_the_place_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    for (images, labels), count in zip(idx.FILES.values(), (60, 20), strict=True):
        pixels, classes = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8), torch.arange(count, dtype=torch.uint8) % 10
        for file, values in ((images, pixels), (labels, classes)):
            header = bytes((0, 0, 8, values.dim())) + struct.pack(f">{values.dim()}I", *values.shape)
            (folder / file).write_bytes(header + values.numpy().tobytes())
    monkeypatch.setattr(convergence, "QUICK_EPOCHS", 2)
    outcome = convergence.run(Options(quick=True, seeds=(0,), data=tmp_path))
    assert outcome.settings["mnist widths"] == (784, 16, 10, 10)
    assert [table.title.split(",")[0].split(":")[0] for table in outcome.tables] == ["mnist", "mnist"]


def test_seeds_are_different_problems_and_the_same_seed_is_the_same() -> None:
    (model, inputs, _), (again, same, _), (other, _, _) = (mlp.problem(seed) for seed in (3, 3, 4))
    assert torch.equal(inputs, same) and torch.equal(model[0].weight, again[0].weight)
    assert not torch.equal(model[0].weight, other[0].weight)
    assert dataclasses.asdict(mlp.train("SGD", "plain", 1e-4, 3))["losses"] == mlp.train("SGD", "plain", 1e-4, 3).losses
