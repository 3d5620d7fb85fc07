"""A script of a user's passes mypy --strict and runs; a script that misuses the same names does not."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TYPED = ROOT / "tests" / "fixtures" / "typed_script.py"
# One wrong use a line, and the kind of error that must be found there.
WRONG = {
    'tf.Every("3")': "arg-type",
    "tf.find_symmetries(3)": "arg-type",
    "tf.attach(tf.Every(2), symmetries)": "arg-type",
    'tf.optim.Rotated(model.parameters(), every="3")': "arg-type",
    "assert_type(symmetries.explain(), int)": "assert-type",
    "tf.ops.gram_difference(G)": "call-arg",
    "tf.no_such_name": "attr-defined",
    "symmetries.no_such_name": "attr-defined",
}


def strict(*files: Path) -> str:
    """mypy's output. It runs with the package's own options (strict), whose cache `make types` has filled."""
    command = [sys.executable, "-P", "-m", "mypy", "--no-error-summary", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900).stdout


def test_the_types_are_checked_strictly() -> None:
    config = (ROOT / "pyproject.toml").read_text().partition("[tool.mypy]")[2].partition("[tool.pytest")[0]
    assert re.search(r"^strict = true$", config, re.M) and "ignore_errors" not in config
    # only what Triton compiles is let off
    relaxed = re.findall(r'module = \["(teleport_fast[^"]*)"\]\n(.*?)\n\n', config, re.S)
    assert {module: settings.count("\n") for module, settings in relaxed} == {"teleport_fast.kernels.*": 5}


def test_a_users_script_runs() -> None:
    runpy.run_path(str(TYPED))


@pytest.mark.skipif(not any(ROOT.glob(".mypy_cache/3.*")), reason="mypy has no cache here and would read torch for minutes: make types")
def test_a_users_script_is_strictly_typed_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong_script.py"
    text = TYPED.read_text()
    first = text.count("\n") + 1
    wrong.write_text(text + "\n".join(WRONG) + "\n")
    found = strict(TYPED, wrong)
    right = [line for line in found.splitlines() if TYPED.name in line]
    assert not right, "\n".join(right)
    reported = {int(line): code for line, code in re.findall(r"wrong_script\.py:(\d+): error: .*\[([\w-]+)\]", found)}
    assert reported == {first + i: code for i, code in enumerate(WRONG.values())}, found
