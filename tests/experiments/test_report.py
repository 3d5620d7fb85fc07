"""What a comparison leaves: JSON that parses, a picture that shows something, a table that hides nothing."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the table needs rich: pip install rich")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install matplotlib")

from matplotlib.image import imread
from rich.console import Console

from teleport_fast.experiments import live as live_module
from teleport_fast.experiments.arms import arm_named
from teleport_fast.experiments.compare import Comparison, Entry, compare
from teleport_fast.experiments.live import Live
from teleport_fast.experiments.picture import draw
from teleport_fast.experiments.report import as_json, print_report, write_json
from teleport_fast.experiments.text import Text
from teleport_fast.experiments.train import Run, Setting


@pytest.fixture
def comparison(tiny: Setting, tiny_text: Text) -> Comparison:
    arms = [Entry(arm_named("adamw"), 0.003, (0, 1)), Entry(arm_named("rotations"), 0.004, (0, 1))]
    return compare(arms, tiny, tiny_text)


def printed(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_report(comparison, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def read_back(value: dict[str, Any], path: Path) -> Any:
    write_json(value, path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_json_holds_everything_that_was_asked_and_measured(
    comparison: Comparison, tiny_text: Text, tmp_path: Path
) -> None:
    found = read_back(as_json(comparison, tiny_text, "python -m teleport_fast train"), tmp_path / "comparison.json")
    assert found["command"] == "python -m teleport_fast train"
    assert found["setting"]["model"]["d_model"] == 32
    assert found["text"]["train_bytes"] == 4000
    assert [arm["label"] for arm in found["arms"]] == ["adamw", "adamw + rotations"]
    assert [row["arm"] for row in found["summary"]] == ["adamw", "adamw + rotations"]
    assert {"torch", "python", "teleport_fast", "threads"} <= set(found["versions"])
    assert [(run["arm"], run["seed"]) for run in found["runs"]] == [(run.arm, run.seed) for run in comparison.runs]
    assert all(len(run["losses"]) == len(run["gradient_norms"]) == 6 for run in found["runs"])
    assert found["function_kept"] is True


def test_a_diverged_run_is_written_as_null_and_shown_in_words(
    comparison: Comparison, tiny_text: Text, tmp_path: Path
) -> None:
    comparison.runs[-1].diverged = True
    found = read_back(as_json(comparison, tiny_text, ""), tmp_path / "comparison.json")
    assert found["summary"][1]["loss"] == [None, None]
    assert "diverged" in printed(comparison)


def test_writing_replaces_the_old_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json({"a": 1}, path)
    with pytest.raises(ValueError, match="Out of range float"):
        write_json({"a": math.nan}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_picture_shows_the_arms(comparison: Comparison, tmp_path: Path) -> None:
    draw(comparison, tmp_path / "both.png")
    pixels = imread(tmp_path / "both.png")[..., :3]
    assert min(pixels.shape[:2]) > 500
    orange = (abs(pixels - [0xD5 / 255, 0x5E / 255, 0]) < 0.02).all(-1)
    assert orange.sum() > 100
    draw(Comparison(comparison.entries, comparison.setting, comparison.of("adamw")), tmp_path / "one.png")
    alone = imread(tmp_path / "one.png")[..., :3]
    assert not (abs(alone - [0xD5 / 255, 0x5E / 255, 0]) < 0.02).all(-1).any()


def test_an_interruption_before_the_first_step_still_gives_a_picture_and_a_sentence(
    comparison: Comparison, tmp_path: Path
) -> None:
    empty = Comparison(comparison.entries, comparison.setting, interrupted=True)
    draw(empty, tmp_path / "empty.png")
    assert imread(tmp_path / "empty.png").size > 0
    assert "nothing was measured" in printed(empty)


def test_the_table_has_a_column_per_arm_and_the_numbers_under_it(comparison: Comparison) -> None:
    shown = printed(comparison)
    for title in (
        "learning rate",
        "validation loss",
        "steps to adamw's loss",
        "overhead, %",
        "logits moved at most",
    ):
        assert title in shown
    assert "adamw + rotations" in shown
    assert "±" in shown


def test_the_table_says_what_makes_it_less_than_what_was_asked_for(comparison: Comparison) -> None:
    comparison.interrupted = True
    comparison.skipped.append("adamw, seed 2: a run takes too long")
    comparison.runs[-1].deviations[0] = 0.5
    shown = " ".join(printed(comparison).split())
    assert "Interrupted" in shown
    assert "Left out: adamw, seed 2" in shown
    assert "A teleport moved the function" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_the_run_its_loss_and_its_speed(
    terminal: bool, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
    run: Run = comparison.runs[0]
    with Live(console, 4, run.steps) as live:
        live.started(run.arm, run.seed)
        live.step(run)
        if live.progress:
            live.progress.refresh()
        live.finished(run)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("1/4 adamw, seed 0", f"loss {run.losses[-1]:.3f}", f"val {run.final:.3f}", "tokens/s"):
        assert part in shown
