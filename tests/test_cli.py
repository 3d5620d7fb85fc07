"""The command line: exit codes, one clear line on bad input, JSON that parses, files that an interruption leaves."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from teleport_fast import cli

pytest.importorskip("typer", reason="the command line needs typer: pip install typer")
pytest.importorskip("rich", reason="the command line needs rich: pip install rich")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install matplotlib")

from teleport_fast.experiments.live import Live
from teleport_fast.experiments.train import Run

TINY = ["--d-model", "32", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "2", "--steps", "6"]


@pytest.fixture(autouse=True)
def one_thread(same_seed_and_settings: None) -> None:
    """At these sizes a second thread only waits, and on a busy machine it waits long."""
    torch.set_num_threads(1)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.txt").write_text(f"file {index} " * 50)
    return folder


def tiny_train(folder: Path, out: Path, *more: str) -> list[str]:
    return ["train", *TINY, "--folder", str(folder), "--out", str(out), "--validate-every", "3", *more]


@pytest.mark.parametrize("verb", [[], ["doctor"], ["inspect"], ["train"], ["report"], ["reproduce"]], ids=lambda verb: " ".join(verb) or "none")
def test_every_verb_has_help(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*verb, "--help"]) == 0
    assert "Usage: python -m teleport_fast" in capsys.readouterr().out


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "inspect" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "No such command 'dance'"),
        (["train", "--steps", "many"], "Invalid value for '--steps'"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0; pass"),
        (
            ["train", "--folder", "nowhere"],
            "folder must name a folder of text files, got 'nowhere', which does not exist",
        ),
        (["train", "--objective", "luck"], "objective must be one of rotations, .*, got 'luck'; pass"),
        (["train", "--arms", "adamw,luck"], "arm must be one of .*, got 'luck'; pass"),
        (["train", "--arms", "adamw,adamw"], "each once, got .*; drop"),
        (["train", "--base", "lion"], "base must be one of .*, got 'lion'; pass"),
        (["train", "--objective", "grad_norm", "--radius", "-1"], "radius must be positive, got -1.0; pass"),
        (["train", "--dtype", "float16"], "dtype must be float32 or float64, got 'float16'; pass"),
        (["train", "--lr", "-1"], "lr must be positive and finite, got -1.0; for example"),
        (["train", "--teleport-lr", "nan"], "teleport_lr must be positive and finite, got nan; for example"),
        (["train", "--table-lr", "nan"], "table_rate must be positive, got nan; pass"),
        (["train", "--minutes", "-1"], "minutes must be positive and finite, got -1.0; for example"),
        (["train", "--direction", "up"], "direction must be one of ascend for rotations, got 'up'"),
        (["train", "--objective", "grad_norm", "--radius", "nan"], "radius must be positive, got nan; pass"),
        (["train", "--seeds", "a"], "seeds must be numbers separated by commas, got 'a'; for example 0,1"),
        (["train", "--threads", "0"], "threads must be at least 1, got 0; pass"),
        (["train", "--mlp", "tanh"], "mlp must be one of .*, got 'tanh'; pass"),
        (["train", "--sweep", "--rates", "0.1,-1"], "rates must be positive, got -1.0; pass"),
        (["inspect", "no/such/folder"], "PATH must be a folder with config.json, got 'no/such/folder', which is none"),
        (["inspect", "nocolon"], "factory must look like MODULE:FUNCTION, got 'nocolon'; for example"),
        (["inspect", "no_such_module:build"], "a module that does not import, got 'no_such_module:build'"),
        (["inspect", "teleport_fast.experiments.gpt:build"], "names no function of teleport_fast.experiments.gpt"),
        (["inspect", "os:getcwd"], "must return a torch.nn.Module, got str from 'os:getcwd'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert shown.err.splitlines()[-1] == lines[0]
    assert re.search(message, lines[0])


def test_a_missing_part_is_named_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    assert cli.main(["doctor"]) == 1
    assert "pip install 'teleport-fast[cli]'" in capsys.readouterr().err


def test_doctor_reports_in_words_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "reference" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_inspect_lists_the_joints_of_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    variant = ["--layers", "1", "--d-model", "16", "--heads", "2", "--context", "8", "--mlp", "swiglu"]
    assert cli.main(["inspect", *variant]) == 0
    assert "blocks.0.attention.value-output" in capsys.readouterr().out
    assert cli.main(["inspect", *variant, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [joint["name"] for joint in report["joints"]]
    assert "blocks.0.attention.value-output" in names
    assert "residual" in names
    assert sum(joint["dim"] for joint in report["joints"]) == report["dim"]


def test_inspect_takes_a_factory_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(3, 4)), (torch.ones(2, 3),)\n"
    (tmp_path / "a_model_of_mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "a_model_of_mine:build", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["joints"] == []


def test_train_leaves_a_table_a_picture_and_json(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = tiny_train(text_folder, out)
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert "validation loss" in shown.out
    assert "1/7 adamw, seed 0" in shown.err
    assert (out / "comparison.png").stat().st_size > 10_000
    found = json.loads((out / "comparison.json").read_text())
    assert found["command"].startswith("python -m teleport_fast train --d-model 32")
    runs = [(run["arm"], run["seed"]) for run in found["runs"]]
    paired = [(arm, seed) for seed in (0, 1) for arm in ("adamw", "adamw + rotations", "rotated")]
    assert runs == [*paired, ("adamw + random", 0)]


def test_json_on_standard_output_is_json_alone(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--json", "--seeds", "3", "--no-control", "--objective", "grad_norm", "--base", "sgd", "--every", "2")
    assert cli.main(tiny_train(text_folder, tmp_path / "out", *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [arm["label"] for arm in found["arms"]] == ["sgd", "sgd + grad_norm, every 2"]
    assert found["runs"][1]["teleports"] == [2, 4]


def test_a_moved_function_is_exit_code_1(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from teleport_fast.experiments import summary

    monkeypatch.setitem(summary.TOLERANCE, "float32", 0.0)
    assert cli.main(tiny_train(text_folder, tmp_path / "out")) == 1


def test_a_sweep_writes_its_rows_and_the_best_rates(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    more = ("--sweep", "--arms", "adamw", "--rates", "0.0001,0.003,0.1", "--seeds", "5")
    assert cli.main(tiny_train(text_folder, out, *more)) == 0
    found = json.loads((out / "sweep.json").read_text())["rates"]["adamw"]
    assert f"adamw: learning rate {found['rate']:g}" in capsys.readouterr().out
    assert len((out / "sweep.jsonl").read_text().splitlines()) == len(found["losses"]) >= 3
    assert min(loss for _, loss in found["losses"]) == found["loss"]


def test_control_c_leaves_table_picture_and_json_of_what_was_measured(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Live.step

    def press(self: Live, run: Run) -> None:
        original(self, run)
        if (run.arm, len(run.losses)) == ("adamw + rotations", 5):
            signal.raise_signal(signal.SIGINT)

    # A background job inherits an ignored SIGINT, for which Python installs no handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(Live, "step", press)
    try:
        assert cli.main(tiny_train(text_folder, tmp_path / "out")) == cli.INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Interrupted" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["interrupted"] is True
    assert [len(run["losses"]) for run in found["runs"]] == [6, 5]
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
