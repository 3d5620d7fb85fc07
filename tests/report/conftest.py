"""A tiny run that `train` wrote, made once: a baseline, rotations, a stretch, and an optimizer with bases of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs typer: pip install typer")
pytest.importorskip("rich", reason="the command line needs rich: pip install rich")
pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install matplotlib")

from teleport_fast import cli

ARMS = "adamw,rotations,grad_norm:every=2,rotated"
TINY = ["--d-model", "32", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "2", "--steps", "7"]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m teleport_fast train --out` leaves; tests that change it take a copy."""
    torch.set_num_threads(1)
    texts, out = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("run")
    for index in range(4):
        (texts / f"{index}.txt").write_text(f"file {index} " * 50)
    arguments = ["train", *TINY, "--folder", str(texts), "--out", str(out), "--validate-every", "3"]
    assert cli.main([*arguments, "--arms", ARMS, "--seeds", "0"]) == 0
    return out


@pytest.fixture(scope="session")
def page_file(run_folder: Path) -> Path:
    """The page about that run, where `report` puts it by default."""
    assert cli.main(["report", str(run_folder)]) == 0
    return run_folder / "report.html"
