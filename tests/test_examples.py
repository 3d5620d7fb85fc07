"""Every example is short, runs as it stands, and teleports when it says so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"transformers": ("transformers", "accelerate"), "accelerate": ("accelerate",), "lightning": ("lightning",)}
# example: (steps at which it teleports, steps that it takes)
TELEPORTS = {
    "accelerate_loop": ([3, 6, 9], 12),
    "hf_trainer": ([3, 6, 9], 12),
    "lightning_automatic": ([9, 12, 15], 16),
    "lightning_manual": ([3, 6], 8),
    "peft_lora": (list(range(8)), 8),
    "schedulefree_loop": ([3, 6, 9], 12),
}


def title(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", EXAMPLES, ids=title)
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs_and_teleports(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M):
        for needed in NEEDS.get(package, (package,)):
            pytest.importorskip(needed, reason=f"needs {needed}; pip install -r requirements/dev.txt")
    if "accelerate" in path.read_text():
        accelerate: Any = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
    ran = runpy.run_path(str(path), run_name="__main__")  # held: it holds the optimizer
    teleporter = ran["teleporter"]
    assert ([record.step for record in teleporter.history], teleporter.step_count) == TELEPORTS[path.stem]
    assert "teleports" in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=title)
def test_an_example_fits_on_a_screen_and_says_how_it_is_run(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 60 and f"`python examples/{path.name}`" in lines[0]


def test_every_example_is_expected_here_and_named_in_the_documentation() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(TELEPORTS)
    page = (ROOT / "docs" / "integrations.md").read_text()
    assert all(f"examples/{path.name}" in page for path in EXAMPLES)
