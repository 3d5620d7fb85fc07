"""The package says the same of itself everywhere, ships what it promises, and sets itself up through the Makefile."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import teleport_fast

ROOT = Path(__file__).resolve().parents[1]
PUBLIC_FILES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "SECURITY.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "CMakeLists.txt",
    "setup.py",
    "pyproject.toml",
    "requirements/dev.txt",
    "requirements/docs.txt",
    "mkdocs.yml",
    ".pre-commit-config.yaml",
    ".github/pull_request_template.md",
    ".ci/run",
    ".ci/environments",
    ".gitignore",
    "docs/mathematics.md",
    "docs/adr/README.md",
    "teleport_fast/py.typed",
    "teleport_fast/_C.pyi",
]
TARGETS = ["setup", "demo", "test", "lint", "types", "docs", "docs-examples", "bench", "bench-each", "clean", "help"]


def read(path: str) -> str:
    return (ROOT / path).read_text()


def requirements() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in read("requirements/dev.txt").splitlines())
    return [Requirement(line) for line in lines if line]


def dry_run(*arguments: str) -> str:
    """What `make` would do, printed and not done, with none of the variables that an outer make hands down."""
    handed_down = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL"}
    settings = set(re.findall(r"^(\w+) \?=", read("Makefile"), re.M))
    environment = {key: value for key, value in os.environ.items() if key not in handed_down | settings}
    command = ["make", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", PUBLIC_FILES)
def test_every_public_file_is_there_and_not_empty(path: str) -> None:
    # py.typed is a marker whose being there is its whole content.
    assert (ROOT / path).is_file() and ((ROOT / path).stat().st_size > 0 or path.endswith("py.typed"))


def test_the_version_is_one_everywhere() -> None:
    declared = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.M)
    cited = re.search(r"^version: (.+)$", read("CITATION.cff"), re.M)
    assert declared and cited
    assert cited[1] == declared[1] == teleport_fast.__version__ == importlib.metadata.version("teleport-fast")


def test_metadata_names_license_python_torch_and_the_command() -> None:
    metadata = importlib.metadata.metadata("teleport-fast")
    required = [Requirement(text) for text in importlib.metadata.requires("teleport-fast") or []]
    always = [requirement for requirement in required if requirement.marker is None]
    scripts = importlib.metadata.entry_points(group="console_scripts", name="teleport-fast")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert [(str(requirement)) for requirement in always] == ["torch>=2.11"]
    assert {"cli", "plot", "triton", "dev"} <= set(metadata.get_all("Provides-Extra") or [])
    assert [script.value for script in scripts] == ["teleport_fast.cli:main"]


def test_the_license_is_the_whole_apache_text() -> None:
    text = read("LICENSE")
    assert text.lstrip().startswith("Apache License") and "END OF TERMS AND CONDITIONS" in text


def test_kernels_inside_the_package_is_a_link_to_the_kernels_outside() -> None:
    link = ROOT / "teleport_fast" / "kernels"
    assert link.is_symlink() and os.readlink(link) == os.path.join("..", "kernels")
    assert link.resolve() == ROOT / "kernels"


def test_the_top_level_kernels_are_not_importable_under_that_name() -> None:
    assert str(ROOT) not in sys.path, "run pytest, not python -m pytest: kernels/ here would hide another package"


def test_every_folder_of_modules_is_a_package_that_ships() -> None:
    from setuptools import find_packages

    shipped = set(find_packages(str(ROOT), include=["teleport_fast*"]))
    # os.walk with followlinks, as setuptools does: the linked kernels count.
    folders = {
        Path(folder).relative_to(ROOT).as_posix().replace("/", ".")
        for folder, _, files in os.walk(ROOT / "teleport_fast", followlinks=True)
        if any(name.endswith(".py") for name in files)
    }
    assert folders == shipped


def test_development_requirements_are_pinned_exactly() -> None:
    loose = [str(r) for r in requirements() if not re.fullmatch(r"==[\w.]+", str(r.specifier))]
    assert not loose and "torch" not in {r.name for r in requirements()}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_supported_python_gets_one_version_of_each_requirement(python: str) -> None:
    names = [r.name for r in requirements() if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert sorted(names) == sorted(set(names)) and set(names) == {r.name for r in requirements()}


def test_pinned_versions_satisfy_the_published_extras() -> None:
    pinned = {r.name: str(r.specifier).removeprefix("==") for r in requirements()}
    published = [Requirement(text) for text in importlib.metadata.requires("teleport-fast") or []]
    bounds = {r.name: r.specifier for r in published if r.name in pinned}
    assert "pytest" in bounds and all(SpecifierSet(str(bounds[name])).contains(pinned[name]) for name in bounds)


def clashes(of: list[str], pinned: list[Requirement]) -> list[str]:
    """Those requirements that a pin breaks. Triton's pin is left out by the Makefile where torch names a triton itself."""
    versions = {r.name: str(r.specifier).removeprefix("==") for r in pinned if r.marker is None or r.marker.evaluate()}
    asked = [r for r in map(Requirement, of) if r.marker is None or r.marker.evaluate({"extra": ""})]
    asked = [r for r in asked if r.name in versions.keys() - {"triton"}]
    return [str(r) for r in asked if not r.specifier.contains(versions[r.name])]


def test_pinned_versions_are_such_as_every_supported_torch_allows() -> None:
    pinned = requirements()
    assert clashes(importlib.metadata.requires("torch") or [], pinned) == []
    # setuptools of torch 2.11.0, and of 2.13.0 and 2.14.1: a pin that breaks one of them has pip take another torch
    assert clashes(["setuptools<82", "setuptools>=77.0.3"], pinned) == []
    assert clashes(["setuptools<81", "triton==3.6.0"], pinned) == ["setuptools<81"]


def test_a_typed_marker_and_only_package_code_are_shipped() -> None:
    config = read("pyproject.toml")
    assert '"py.typed"' in config and 'include = ["teleport_fast*"]' in config


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_the_makefile_has_its_documented_targets(target: str) -> None:
    dry_run(target, "VENV=.venv-of-a-dry-run")
    assert re.search(rf"^{target}:.*## \S", read("Makefile"), re.M)


@needs_make
def test_tests_run_through_pytest_itself_and_the_demo_through_the_package() -> None:
    test, demo = dry_run("test", "VENV=.venv-of-a-dry-run"), dry_run("demo", "VENV=.venv-of-a-dry-run")
    assert test.splitlines()[-1].split()[0].endswith("/bin/pytest") and "-m pytest" not in test
    assert demo.splitlines()[-1].strip().endswith("/bin/python -m teleport_fast train --out runs/demo")


@needs_make
def test_make_variables_choose_the_interpreter_torch_and_pips_arguments() -> None:
    choices = ("PYTHON=python3.12", "TORCH=torch==2.11.0", "PIP_ARGS=--no-index")
    done = dry_run("setup", "VENV=.venv-of-a-dry-run", *choices)
    assert "python3.12 -m venv" in done
    assert re.search(r"install --no-index 'torch==2\.11\.0'", done)
    assert "--no-build-isolation --no-deps -e ." in done
    # the requirements may not bring another torch than the one asked for
    (install,) = [line for line in done.splitlines() if "install" in line and "/dev.txt" in line]
    (held,) = re.findall(r" -c (\S+)", install)
    assert re.search(rf"m\.version\(\"torch\"\)\)' > {re.escape(held)}", done)


def test_ci_runs_the_readmes_test_command_last() -> None:
    commands = [line for line in read(".ci/run").splitlines() if line.strip() and not line.startswith("#")]
    assert commands[-1] == "make test" and "make test " in read("README.md")
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_environments_name_those_that_there_are_and_cover_the_least_torch() -> None:
    done = subprocess.run(["bash", ".ci/environments", "barest"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "barest; there are bare, bare-2.11 and built-2.11" in done.stderr
    least = re.search(r'dependencies = \["torch>=([\d.]+)"\]', read("pyproject.toml"))
    assert least is not None and f"torch={least[1]}.0 " in read(".ci/environments")


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_will_be_taken_away_is_an_error_where_our_line_asks_for_it(category: type[Warning]) -> None:
    with pytest.raises(category):
        warnings.warn_explicit("soon gone", category, "gram.py", 1, module="teleport_fast.ops.gram")
    with pytest.warns(category):
        warnings.warn_explicit("soon gone", category, "gram.py", 1, module="torch.ops.gram")
