"""`make bench-each` finds every benchmark: those that share code import their neighbours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_benchmark_is_collected() -> None:
    command = [str(Path(sys.executable).parent / "pytest"), "bench", "--collect-only", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {f"bench/ops/bench_{op}.py" for op in ("square_sums", "diagonal_action", "matrix_exp", "rotate_step")} <= collected
