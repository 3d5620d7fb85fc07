"""The doctor tells the truth about what is there, and names a way out for what is not."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import sysconfig
from pathlib import Path
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


@pytest.mark.usefixtures("pure_python")
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    report = doctor.diagnose()
    assert report["packages"]["triton"]["reason"] == "triton is not installed"
    assert report["packages"]["triton"]["remedy"] == "pip install 'teleport-fast[triton]' (or: pip install triton)"
    assert report["backends"]["triton"]["remedy"] == report["packages"]["triton"]["remedy"]
    header = report["tools"]["Python.h"]
    assert header["reason"] == f"{tmp_path / 'Python.h'} does not exist" and "apt-get install python3-dev" in header["remedy"]
    (tmp_path / "Python.h").touch()
    assert doctor.diagnose()["tools"]["Python.h"]["available"]


def test_the_way_to_the_cuda_backend_is_told_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = {"available": False, "remedy": "install the CUDA toolkit"}

    def remedy() -> str:
        return doctor._remedy("cuda", {"nvcc": nvcc}, {})

    monkeypatch.setattr(torch.version, "cuda", None)
    assert remedy() == f"install a CUDA build of torch, then {doctor.REBUILD}"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert remedy() == "needs an NVIDIA GPU and its driver"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert remedy() == f"install the CUDA toolkit, then {doctor.REBUILD}"
    nvcc["available"] = True
    assert remedy() == doctor.REBUILD


def test_a_tool_that_does_not_say_its_version_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "cmake"
    tool.write_text("#!/bin/sh\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    report = doctor.diagnose()["tools"]["cmake"]
    assert not report["available"] and report["reason"].startswith(f"{tool} --version failed: ")
    tool.write_text("#!/bin/sh\necho\necho cmake version 4\n")
    assert doctor.diagnose()["tools"]["cmake"]["version"] == "cmake version 4"


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
