"""Rows of many ranks: each column's checks of columns.py run once, in two real processes of torch.distributed, over gloo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "distributed"))

import ranks  # noqa: E402


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """What the checks of the selected cells came to, from one process that forks the ranks."""
    cells = [item for item in request.session.items if Path(item.fspath) == Path(__file__)]  # type: ignore[attr-defined]
    chosen = [f"{CHECKS[item.originalname]}:{item.callspec.params['arm']}-2" for item in cells]  # type: ignore[attr-defined]
    return ranks.outcomes_of(chosen, HERE / "columns.py")


def came_out_well(arm: Any, outcomes: dict[str, str | None], check: str) -> None:
    if arm.name == "schedulefree":
        pytest.importorskip("schedulefree", reason="needs schedulefree; pip install -r requirements/dev.txt")
    problem = outcomes[f"{check}:{arm.name}-2"]
    assert problem is None, problem


@pytest.mark.support("DistributedDataParallel on two ranks: one process' run, and its bits on both")
def test_data_parallel_runs_are_those_of_one_process(arm: Any, outcomes: dict[str, str | None]) -> None:
    came_out_well(arm, outcomes, "data_parallel")


@pytest.mark.support("fully_shard (FSDP2) on two ranks: one process' run")
def test_fully_sharded_runs_are_those_of_one_process(arm: Any, outcomes: dict[str, str | None]) -> None:
    if arm.name == "Muon":
        arm.note("to the bfloat16 in which torch's Muon multiplies")
    came_out_well(arm, outcomes, "fully_sharded")


@pytest.mark.support("a run under fully_shard resumed bit for bit from torch's distributed checkpoint")
def test_sharded_runs_resume_bit_for_bit(arm: Any, outcomes: dict[str, str | None]) -> None:
    if arm.name == "schedulefree":
        arm.note("after `optimizer.state.clear()`: its train() leaves entries that torch's loader takes for a state")
    came_out_well(arm, outcomes, "resumed")


CHECKS = {
    "test_data_parallel_runs_are_those_of_one_process": "data_parallel",
    "test_fully_sharded_runs_are_those_of_one_process": "fully_sharded",
    "test_sharded_runs_resume_bit_for_bit": "resumed",
}
