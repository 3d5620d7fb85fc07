"""The doctor tells the truth about what is there, and names a way out for what is not."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from teleport_fast import doctor
from teleport_fast.ops.backend import BACKENDS, backends


def every_part(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    parts = [(name, part) for group in ("packages", "tools", "backends") for name, part in report[group].items()]
    return [*parts, ("extension", report["extension"])]


@pytest.fixture
def pure_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """An install without native libraries: the backends say so, and None in sys.modules makes the import of _C fail."""
    states = dict.fromkeys(BACKENDS, "not built") | {"reference": True}
    monkeypatch.setattr("teleport_fast.ops.backend.backends", lambda: states)
    monkeypatch.setitem(sys.modules, "teleport_fast._C", None)


def test_the_report_is_plain_data() -> None:
    report = doctor.diagnose()
    assert json.loads(json.dumps(report)) == report


def test_backends_agree_with_the_ops_own_word() -> None:
    assert {name: part["available"] for name, part in doctor.diagnose()["backends"].items()} == {
        name: state is True for name, state in backends().items()
    }


@pytest.mark.usefixtures("pure_python")
def test_every_missing_part_names_a_reason_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    parts = every_part(doctor.diagnose())
    assert all(part["reason"] and part["remedy"] for _, part in parts if not part["available"])
    assert {"c++", "cpp", "extension"} <= {name for name, part in parts if not part["available"]}


def test_torch_and_threads_are_those_of_this_process() -> None:
    torch.set_num_threads(1)
    report = doctor.diagnose()
    assert (report["torch"]["version"], report["threads"]["torch"]) == (torch.__version__, 1)


@pytest.mark.usefixtures("pure_python")
def test_a_pure_python_install_is_usable_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    report = doctor.diagnose()
    assert report["ok"] and not report["extension"]["available"]
    assert "no-such-compiler" in report["tools"]["c++"]["reason"]
    assert "c++" in report["extension"]["reason"] and "apt-get install g++" in report["extension"]["remedy"]
    assert "pure Python" in doctor.summary(report)


@pytest.mark.usefixtures("pure_python")
def test_tools_without_an_extension_lead_to_a_build_that_may_not_fail_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = ("c++", "cmake", "ninja", "Python.h", "nvcc")
    monkeypatch.setattr(doctor, "_tools", lambda: {tool: {"available": True, "version": "1"} for tool in tools})
    assert f"TELEPORT_FAST_REQUIRE_EXT=1 {doctor.REBUILD}" in doctor.diagnose()["extension"]["remedy"]


@pytest.mark.skipif(backends()["cpp"] is not True, reason="the extension is not built here")
def test_a_built_extension_names_its_instruction_set() -> None:
    extension = doctor.diagnose()["extension"]
    assert extension["available"] and extension["build"]["isa"]


@pytest.mark.usefixtures("pure_python")
def test_the_text_shows_every_part() -> None:
    report = doctor.diagnose()
    text = doctor.render(report)
    assert all(f"  {name} " in text for group in ("packages", "tools", "backends") for name in report[group])
    assert all(part["remedy"] in text for _, part in every_part(report) if not part["available"])


def test_requiring_a_missing_backend_fails_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--summary", "--require", "reference"]) == 0
    assert capsys.readouterr().err == ""
    assert doctor.main(["--summary", "--require", "abacus"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("required backend abacus is missing: no such backend") and error.count("\n") == 1


def test_json_output_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"]["version"] == torch.__version__
