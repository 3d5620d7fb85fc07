"""Every check of this folder's `checks_*.py`, run once in real processes, is a test here."""

from __future__ import annotations

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
    return ranks.outcomes_of(chosen)


@pytest.mark.parametrize("name", NAMES)
def test_on_ranks(name: str, outcomes: dict[str, str | None]) -> None:
    problem = outcomes[name]
    assert problem is None, problem
