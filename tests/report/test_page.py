"""The page: self-contained, well-formed, complete, and safe against text that a run's files bring along."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from teleport_fast import cli
from teleport_fast.report import plots
from teleport_fast.report.page import cards, notes, render, shown
from teleport_fast.report.read import NUMBERS, Found, History, RunRead

VOID = {"meta", "link", "br", "img", "hr", "input"}
LOADING = {"src", "srcset", "data", "poster", "action", "background"}


class Outline(HTMLParser):
    """Tags must close in order; collects ids, in-page links, whatever would be loaded, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.anchors: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            value = value or ""
            if key == "id":
                self.ids.append(value)
            elif key in ("href", "xlink:href"):
                (self.anchors if value.startswith("#") else self.loaded).append(value)
            elif key in LOADING or key.startswith("on"):
                self.loaded.append(f"{key}={value}")
            for address in re.findall(r"url\(([^)]*)\)", value):
                (self.anchors if address.startswith("#") else self.loaded).append(address)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.loaded += re.findall(r"url\([^)]*\)|@import[^;]*", data)
        self.text += data


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    return parsed


@pytest.fixture(scope="session")
def page(page_file: Path) -> str:
    return page_file.read_text()


def test_nothing_is_loaded_and_every_link_of_the_page_ends_in_it(page: str) -> None:
    parsed = outline(page)
    # the empty icon keeps browsers from asking a server for one
    assert parsed.loaded == ["data:,"]
    assert {anchor.removeprefix("#") for anchor in parsed.anchors} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "script" not in parsed.tags


def test_the_control_a_page_that_loads_something_is_seen() -> None:
    parsed = outline('<p><img src="https://example.org/a.png"><a href="#there">x</a></p><style>@import "x.css";</style>')
    assert parsed.loaded == ["src=https://example.org/a.png", '@import "x.css"']
    with pytest.raises(AssertionError, match="closes what is not open"):
        outline("<p><b></p></b>")


def test_every_part_of_a_run_is_there(page: str) -> None:
    parsed = outline(page)
    assert {"curves", "teleports", "spectra", "joints", "settings", "reproduce"} <= set(parsed.ids)
    # curves; teleports of two arms; spectra of two arms with a basis and one with a stretch
    assert parsed.tags.count("svg") == 6
    for part in ("adamw + rotations", "blocks.0.attention.value-output", "The function was checked", "torch", "python -m teleport_fast train"):
        assert part in parsed.text
    assert "teleports-1-" in page and "spectra-3-" in page


def test_text_of_a_run_never_becomes_markup(run_folder: Path, tmp_path: Path) -> None:
    hostile = '<script>alert("x")</script>&$\\frac{1}{0}$'
    folder = tmp_path / "<b>run"
    shutil.copytree(run_folder, folder)
    everything = json.loads((folder / "comparison.json").read_text())
    of_one_arm = json.dumps({**everything, "runs": everything["runs"][1:2], "arms": everything["arms"][1:2]})
    found = of_one_arm.replace("adamw + rotations", json.dumps(hostile)[1:-1])
    (folder / "comparison.json").write_text(found.replace("blocks.0.attention.value-output", "<img src=x onerror=1>"))
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    parsed = outline((tmp_path / "page.html").read_text())
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert hostile in parsed.text and "<img src=x onerror=1>" in parsed.text


def test_an_older_record_gives_a_page_that_says_what_it_lacks(tmp_path: Path) -> None:
    from teleport_fast.experiments.sweep import RECORDED

    shutil.copy(RECORDED / "comparison.json", tmp_path)
    shutil.copy(RECORDED / "sweep.json", tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 0
    parsed = outline((tmp_path / "report.html").read_text())
    assert "this run did not record their objective" in parsed.text
    assert {"curves", "sweep", "settings"} <= set(parsed.ids) and "spectra" not in parsed.ids


def test_a_folder_of_histories_alone_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"step": i, "objective_before": 1.0, "objective_after": 2.0, "radius_used": 0.5, "seconds": 0.01} for i in range(3)]
    (tmp_path / "rank0.json").write_text(json.dumps({"history": records}))
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == Path(told["page"]).stat().st_size
    assert "rank0: 3 teleports" in outline(Path(told["page"]).read_text()).text


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "error: RUN_DIR must be a folder" in capsys.readouterr().err
    (tmp_path / "h.json").write_text('[{"step": 1, "objective_after": 2}]')
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "file" / "page.html")]) == 2
    assert "error: out must be a file that can be written" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "words"), [(None, "–"), ([None, 1], "–"), ("3", "–"), (float("inf"), "–"), (True, "–"), (2, "2")])
def test_what_is_no_number_is_a_dash(value: object, words: str) -> None:
    assert shown(value) == words


def a_run(arm: str = "adamw", **changes: Any) -> RunRead:
    known = {"step": 1.0, "objective_before": 1e-4, "objective_after": 2.0, "radius_used": 0.5, "seconds": 0.1}
    record = dict.fromkeys(NUMBERS, math.nan) | known
    history = History(f"{arm}, seed 0", (record,))
    read = RunRead(arm, "0", ((2.0, 3.1),), (3.4, 3.2), (0.0, 0.0), (1.0,), (1e-9,), False, history, ())
    return replace(read, **changes)


def test_what_went_wrong_is_the_first_thing_said() -> None:
    found = Found(Path(), {"function_kept": False, "interrupted": True}, (a_run(deviations=(0.25,)), a_run("sgd", diverged=True)))
    assert notes(found) == [
        ("bad", "A teleport moved the function: its logits moved by 2.5e-01 of their norm."),
        ("warn", "Interrupted: the page shows what was measured until then."),
        ("warn", "sgd, seed 0: diverged after 2 steps."),
    ]
    kept = Found(Path(), {"function_kept": True}, (a_run(),), sweep={"interrupted": True})
    assert [level for level, _ in notes(kept)] == ["good", "warn"]


def test_an_arm_that_shares_no_seed_with_the_baseline_is_not_compared() -> None:
    rows = [{"arm": "adamw", "loss": [3.0]}, {"arm": "sgd", "loss": [2.5], "gain": None}, {"arm": "new", "loss": [2.5], "gain": [0.5, 0.1]}]
    first, apart, paired = cards(Found(Path(), {"baseline": "adamw", "summary": rows}))
    assert first["note"].endswith("the baseline")
    assert apart["note"].startswith("not paired with adamw; its loss not reached")
    assert paired["note"].startswith("0.500 ± 0.100 below adamw")


def test_an_arm_that_was_listed_but_never_ran_leaves_the_others_their_plots() -> None:
    found = Found(Path(), {"arms": [{"label": "never"}, {"label": "adamw"}]}, (a_run(),))
    page = render(found)
    assert "teleports-1-" in page and "teleports-0-" not in page and "curves-" in page


def test_runs_that_hold_no_losses_have_no_curves() -> None:
    assert plots.curves(Found(Path(), runs=(a_run(losses=()),))) is None
    drawn = plots.curves(Found(Path(), runs=(a_run(validation=()),)))
    assert drawn is not None and "<svg" in drawn
    assert "<svg" not in render(Found(Path(), runs=(a_run(losses=(), history=History("", ())),)))


@pytest.mark.parametrize(("before", "logarithmic"), [(1e-4, True), (1.0, False), (-1e-4, False)])
def test_an_objective_over_two_decades_is_drawn_on_a_logarithmic_scale(
    before: float, logarithmic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(plots, "_logarithmic", lambda axis, _: asked.append(axis))
    (record,) = a_run().history.records
    assert plots.teleports(History("run", ({**record, "objective_before": before},)), (), "t", "#000") is not None
    assert len(asked) == logarithmic


def test_a_sweep_whose_best_is_unknown_has_its_line_without_a_ring() -> None:
    points = [[0.001, 3.0], [0.002, 2.5]]
    ringed, bare = (plots.sweep({"rates": {"adamw": {**best, "losses": points}}}) for best in ({"rate": 0.002, "loss": 2.5}, {"rate": None}))
    assert ringed is not None and bare is not None and len(ringed) > len(bare)
