"""The recorded comparison: three paired seeds at tuned rates, exact moves, and a difference that is large enough."""

from __future__ import annotations

import json
from typing import Any

import pytest

from teleport_fast.experiments.sweep import RECORDED
from teleport_fast.experiments.train import TOLERANCE

RECORDS = sorted(RECORDED.glob("comparison*.json"))


@pytest.fixture(params=RECORDS, ids=lambda path: path.stem)
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(request.param.read_text())
    return loaded


def runs_of(record: dict[str, Any], arm: str) -> dict[int, dict[str, Any]]:
    return {run["seed"]: run for run in record["runs"] if run["arm"] == arm}


def test_a_comparison_is_recorded() -> None:
    assert RECORDS


def test_rotations_end_at_least_a_tenth_below_adamw_over_three_paired_seeds(record: dict[str, Any]) -> None:
    plain, turned = (runs_of(record, arm) for arm in ("adamw", "adamw + rotations"))
    assert set(plain) == set(turned) and len(plain) >= 3
    gains = [plain[seed]["validation"][-1][1] - turned[seed]["validation"][-1][1] for seed in plain]
    assert sum(gains) / len(gains) >= 0.1
    assert min(gains) > 0


def test_rotated_is_recorded_on_the_same_seeds_and_ends_below_adamw_on_each(record: dict[str, Any]) -> None:
    plain, rotated = (runs_of(record, arm) for arm in ("adamw", "rotated"))
    assert set(plain) == set(rotated)
    assert all(plain[seed]["validation"][-1][1] > run["validation"][-1][1] for seed, run in rotated.items())


def test_a_random_control_is_recorded_and_does_not_do_it(record: dict[str, Any]) -> None:
    plain, random = (runs_of(record, arm) for arm in ("adamw", "adamw + random"))
    assert random
    gains = [plain[seed]["validation"][-1][1] - run["validation"][-1][1] for seed, run in random.items()]
    assert sum(gains) / len(gains) < 0.05


def test_every_recorded_run_is_complete_and_its_summary_follows_from_it(record: dict[str, Any]) -> None:
    assert record["command"].startswith("python -m teleport_fast train ")
    assert record["interrupted"] is False
    assert record["skipped"] == []
    for run in record["runs"]:
        assert len(run["losses"]) == run["steps"] == record["setting"]["steps"]
    for row in record["summary"]:
        finals = [run["validation"][-1][1] for run in runs_of(record, row["arm"]).values()]
        assert row["loss"][0] == pytest.approx(sum(finals) / len(finals))


def test_no_recorded_teleport_moved_the_function(record: dict[str, Any]) -> None:
    allowed = TOLERANCE[record["setting"]["dtype"]]
    for arm in ("adamw + rotations", "adamw + random"):
        for run in runs_of(record, arm).values():
            assert len(run["deviations"]) == len(run["teleports"]) > 0
            assert max(run["deviations"]) <= allowed
