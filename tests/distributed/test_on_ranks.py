"""Every check of this folder's `checks_*.py`, run once in real processes, is a test here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import ranks  # noqa: E402

NAMES = sorted(ranks.load())


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """What the selected checks came to, from one process that forks the ranks."""
    chosen = [item.callspec.params["name"] for item in request.session.items if item.fspath == __file__]  # type: ignore[attr-defined]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(HERE / "ranks.py"), *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    found: dict[str, str | None] = dict.fromkeys(chosen, f"the check was not run\n{done.stderr[-4000:]}")
    for line in done.stdout.splitlines():
        if line.startswith('{"name"'):
            outcome = json.loads(line)
            found[outcome["name"]] = outcome["problem"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_on_ranks(name: str, outcomes: dict[str, str | None]) -> None:
    problem = outcomes[name]
    assert problem is None, problem
