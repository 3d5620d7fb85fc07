"""The soak of bench/step/soak.py, short; the long one is a command, and what it measured is in docs/trust.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from teleport_fast.record import Pending, Records

PATH = Path(__file__).resolve().parent.parent / "bench/step/soak.py"
spec = importlib.util.spec_from_file_location("soak", PATH)
assert spec is not None and spec.loader is not None
soak: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_resident_memory_does_not_grow_over_a_run() -> None:
    torch.set_num_threads(1)
    report = soak.memory(1500)
    assert report["teleports"] == [499, 499]
    assert report["finite"]
    assert report["growth"] <= soak.GROWTH


@pytest.mark.parametrize(("objective", "frame"), [("grad_norm", "return"), ("random", "stay")])
def test_the_function_does_not_drift_over_a_hundred_teleports(objective: str, frame: str) -> None:
    torch.set_num_threads(1)
    moved = soak.drift(100, objective, frame)
    assert 0 < moved <= soak.DRIFT


def test_a_history_keeps_every_record_in_few_bytes() -> None:
    history = Records()
    for step in range(2000):
        values = (torch.tensor(float(step + i)) for i in range(3))
        before, after, radius = values
        history.append(Pending(step, before, after, radius, 0.5, 3, torch.tensor(step % 7 == 0)))
    records = history.read()
    assert [record.step for record in records] == [step for step in range(2000) if step % 7]
    assert all(record.objective_after == record.step + 1 and record.joints == 3 for record in records)
    assert len(history._latest) < Records.LATEST
    assert history.last() == records[-1]
    assert Records().last() is None
