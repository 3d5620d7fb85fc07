"""`make bench-each` finds every benchmark: those that share code import their neighbours; and what measures a step runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_benchmark_is_collected() -> None:
    command = [str(Path(sys.executable).parent / "pytest"), "bench", "--collect-only", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {f"bench/ops/bench_{op}.py" for op in ("square_sums", "diagonal_action", "matrix_exp", "rotate_step")} <= collected


@pytest.mark.parametrize("script", ["optim_steps", "teleport_overhead"])
def test_what_a_step_costs_is_measured_for_every_row(script: str) -> None:
    command = [sys.executable, f"bench/step/{script}.py", "--json", "--rounds", "2", "--batch", "1", "--d-model", "32", "--layers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = found.get("rows", found)
    assert len(rows) > 5 and all(row["median"] == row["median"] for row in rows.values()), rows
