"""What studies hand back: samples that say their spread, tables of one shape, a verb that leaves JSON and a picture."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command line needs typer: pip install typer")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install matplotlib")

from matplotlib.image import imread

from teleport_fast import cli
from teleport_fast.experiments.studies import NAMES, study_named, written
from teleport_fast.experiments.studies.study import Options, Sample, Table


def test_a_sample_is_its_mean_and_sd_and_a_diverged_run_is_not_hidden() -> None:
    values = tuple(random.random() for _ in range(7))
    sample = Sample(values)
    assert (sample.mean, sample.sd) == (statistics.fmean(values), statistics.stdev(values))
    assert str(Sample((*values, math.nan))) == "diverged (1 of 8)"
    assert Sample((*values, math.nan)).median == pytest.approx(statistics.median((*values, 9.0)))
    with pytest.raises(ValueError, match="values must hold at least one number"):
        Sample(())


@pytest.mark.parametrize("seeds", [2, 5, 40])
def test_the_interval_covers_the_mean_in_95_percent(seeds: int) -> None:
    draws = 3000
    inside = 0
    for _ in range(draws):
        low, high = Sample(tuple(random.gauss(0, 1) for _ in range(seeds))).interval
        inside += low <= 0 <= high
    assert inside / draws == pytest.approx(0.95, abs=0.015)


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="rows must have 2 cells like columns, got 1"):
        Table("t", ("a", "b"), (("x",),))


def test_a_bar_gets_the_items_that_are_tracked() -> None:
    seen, lines = [], []
    options = Options(bar=lambda items, text: (seen.append((text, item)) or item for item in items))
    assert list(options.track([1, 2], "work")) == [1, 2]
    assert seen == [("work", 1), ("work", 2)]
    assert list(Options(say=lines.append).track([3], "work")) == [3]
    assert lines == ["work"]


def test_reproduce_leaves_a_table_claims_a_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "booth", "--quick", "--seeds", "3,4", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "highest gradient" in shown.out and "holds: one teleport" in shown.out
    assert imread(tmp_path / "booth.png").std() > 0.05
    found = json.loads((tmp_path / "booth.json").read_text())
    assert found["command"] == f"python -m teleport_fast reproduce booth --quick --seeds 3,4 --out {tmp_path}"
    assert found["settings"]["seeds"] == [3, 4]
    assert len(found["tables"][0]["rows"][1][1]["values"]) == 2


def test_json_on_standard_output_is_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "booth", "--json", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["claims"][0]["holds"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["luck"], "study must be one of rosenbrock, .*, all, got 'luck'; pass one of these names"),
        (["booth", "--seeds", "a"], "seeds must be numbers separated by commas, got 'a'"),
        (["booth", "--threads", "0"], "threads must be at least 1, got 0"),
        (["booth", "--data", "/nowhere"], "data must name a folder, got '/nowhere', which is none"),
        (["booth", "--out", "/dev/null/x"], "out must be a folder that can be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", *arguments]) == 2
    assert re.search(f"^error: {message}", capsys.readouterr().err)


def test_a_study_without_a_module_is_refused_with_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import teleport_fast.experiments.studies as studies

    assert set(written()) <= set(NAMES)
    monkeypatch.setattr(studies, "NAMES", (*NAMES, "no-such-study"))
    with pytest.raises(ValueError, match=r"study no-such-study is not written yet; there are .*booth"):
        study_named("no-such-study")
