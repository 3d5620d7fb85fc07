"""Reading a run's folder: everything that is one is taken, everything else is named, nothing is guessed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from teleport_fast.report.read import read_folder

RECORD = {"step": 3, "objective_before": 1.0, "objective_after": 2.0, "radius_used": 0.5, "seconds": 0.01, "joints": 4, "condition": 1.5}


@pytest.mark.parametrize(
    "value",
    [[RECORD], {"history": [RECORD], "optimizer": "AdamW"}, {"records": [RECORD]}, {"teleports": [RECORD, "no record"]}],
    ids=["a list", "history", "records", "teleports"],
)
def test_a_history_is_read_from_a_list_and_from_an_object_that_holds_one(value: Any, tmp_path: Path) -> None:
    (tmp_path / "rank0.json").write_text(json.dumps(value))
    (history,) = read_folder(tmp_path).histories
    assert (history.name, [dict(record) for record in history.records]) == ("rank0", [RECORD])


def test_a_history_may_have_a_record_a_line_and_lack_numbers(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 1, "objective_after": "high"}\n\n{"step": 2, "objective_after": 1}\n')
    first, second = read_folder(tmp_path).histories[0].records
    assert math.isnan(first["objective_after"]) and math.isnan(second["seconds"]) and math.isnan(second["condition"])
    assert second["objective_after"] == 1.0


def test_what_is_no_run_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(json.dumps([RECORD]))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "other.json").write_text('{"steps": 3}')
    reasons = dict(read_folder(tmp_path).left_out)
    assert set(reasons) == {"broken.json", "deep.json", "other.json"}
    assert "not readable as JSON" in reasons["broken.json"]
    assert "neither a comparison" in reasons["other.json"]


@pytest.mark.parametrize("runs", [[{}], [{"arm": 3, "losses": "none", "validation": [[1], 2, ["a", "b"]], "joints": 7, "history": {}}]])
def test_a_run_of_another_shape_is_read_as_far_as_it_goes(runs: list[Any], tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({"runs": runs, "arms": None, "summary": [3]}))
    (run,) = read_folder(tmp_path).runs
    assert run.validation == run.losses == run.joints == run.history.records == ()


def test_no_run_is_an_error_that_names_the_folder_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RUN_DIR must hold comparison.json.*no .json file in it.; run train first"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match=r"RUN_DIR must be a folder.*nowhere.*; run train first"):
        read_folder(tmp_path / "nowhere")
