"""What `train` records about joints is what the teleporter did, and what the matrices say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import teleport_fast as tf
from teleport_fast.experiments.joints import POINTS, WIDEST, Watched, _covariance, joint_rows
from teleport_fast.objectives import Fixed
from teleport_fast.optimizer import attach_as


def mlp() -> tuple[torch.nn.Module, torch.Tensor]:
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)), torch.randn(6, 5)


def moved_by(scale: torch.Tensor, steps: int = 2, form: str = "diagonal") -> list[dict[str, Any]]:
    model, x = mlp()
    symmetries = tf.find_symmetries(model, (x,))
    name = next(joint.name for joint in symmetries if joint.group.form == form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    teleporter = attach_as(Watched, optimizer, symmetries, Fixed({name: scale}), tf.Every(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    rows = joint_rows(model, optimizer, teleporter)
    assert {row["why_not"] for row in rows if "moves" not in row} <= {"no element was given for this joint"}
    return [row for row in rows if "moves" in row]


def test_a_known_element_gives_its_own_spectrum_distance_and_count() -> None:
    scale = torch.tensor([[0.5, 1.0, 2.0, 4.0]])
    (row,) = moved_by(scale)
    assert row["moves"] >= 1
    assert row["log_p"] == pytest.approx([2 * math.log(4), 2 * math.log(2), 0.0, 2 * math.log(0.5)], abs=1e-4)
    assert row["distance"] == pytest.approx([(scale - 1).norm().item()] * 2, rel=1e-6)
    # the control: another element is told apart
    (other,) = moved_by(torch.full((1, 4), 3.0))
    assert other["log_p"] == pytest.approx([2 * math.log(3)] * 4, abs=1e-4)


def test_an_order_has_no_size_and_a_covariance_without_numbers_no_spectrum() -> None:
    (row,) = moved_by(torch.tensor([[1, 0, 3, 2]]), form="permutation")
    assert row["moves"] >= 1 and row["log_p"] is None and row["distance"] == [None, None]
    some = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert _covariance(some, None) == {"eigenvalues": [0.75, 0.25], "diagonal": [0.75, 0.25], "share": 1.0}
    assert _covariance(0 * some, None) is _covariance(some / 0, None) is _covariance(torch.eye(WIDEST + 1)[None], None) is None


def runs_of(folder: Path) -> dict[str, Any]:
    return {run["arm"]: run for run in json.loads((folder / "comparison.json").read_text())["runs"]}


def test_every_run_holds_what_its_kind_of_arm_can_say(run_folder: Path) -> None:
    runs = runs_of(run_folder)
    assert runs["adamw"]["history"] == runs["adamw"]["joints"] == []
    for name in ("adamw + rotations", "adamw + grad_norm, every 2"):
        run = runs[name]
        assert [record["step"] for record in run["history"]] == run["teleports"] != []
        assert all({"objective_before", "objective_after", "radius_used"} <= set(record) for record in run["history"])
        assert {row["moves"] for row in run["joints"] if row["why_not"] is None} == {len(run["teleports"])}
    assert all(row["why_not"] is None or "moves" not in row for run in runs.values() for row in run["joints"] if "why_not" in row)


def test_rotations_leave_p_alone_and_a_stretch_does_not(run_folder: Path) -> None:
    runs = runs_of(run_folder)
    turned = [row for row in runs["adamw + rotations"]["joints"] if row.get("log_p")]
    stretched = [row for row in runs["adamw + grad_norm, every 2"]["joints"] if row.get("log_p")]
    assert turned and stretched
    assert max(abs(value) for row in turned for value in row["log_p"]) < 1e-4
    assert max(abs(value) for row in stretched for value in row["log_p"]) > 0.1


@pytest.mark.parametrize("arm", ["adamw + rotations", "rotated"])
def test_covariances_are_shares_of_the_trace_and_majorized_by_their_eigenvalues(arm: str, run_folder: Path) -> None:
    rows = [row["covariance"] for row in runs_of(run_folder)[arm]["joints"] if row.get("covariance")]
    assert rows
    for row in rows:
        assert 0 < row["share"] <= 1 + 1e-9
        assert len(row["eigenvalues"]) == len(row["diagonal"]) <= POINTS
        # Schur: the largest diagonal entry is no larger than the largest eigenvalue
        assert row["diagonal"][0] <= row["eigenvalues"][0] * (1 + 1e-4)
