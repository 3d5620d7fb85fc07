"""TensorBoard's curves have a point per teleport, with the record's own numbers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

import teleport_fast as tf
from teleport_fast.integrations.tensorboard import to_tensorboard

RECORDS = [tf.TeleportRecord(step, 1.0 + step, 2.0, 0.5, 0.01, 4, 1.6) for step in (3, 6)]


class Writer:
    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.points.append((tag, value, step))


def test_every_field_is_a_curve_over_the_steps() -> None:
    writer = Writer()
    write = to_tensorboard(writer, prefix="moves")
    for record in RECORDS:
        write(record)
    fields = [field.name for field in dataclasses.fields(tf.TeleportRecord) if field.name != "step"]
    assert writer.points == [(f"moves/{name}", getattr(r, name), r.step) for r in RECORDS for name in fields]


def test_a_folder_gets_an_event_file_that_tensorboard_reads(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard; pip install -r requirements/dev.txt")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    write = to_tensorboard(tmp_path)
    for record in RECORDS:
        write(record)
    next(cell.cell_contents for cell in write.__closure__ or () if hasattr(cell.cell_contents, "flush")).flush()
    (file,) = tmp_path.iterdir()
    events = [(v.tag, e.step) for e in EventFileLoader(str(file)).Load() for v in e.summary.value]
    assert events.count(("teleport/objective_after", 3)) == events.count(("teleport/condition", 6)) == 1
    assert len(events) == 2 * (len(dataclasses.fields(tf.TeleportRecord)) - 1)


def test_what_has_no_add_scalar_is_refused_and_a_missing_tensorboard_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"writer must have add_scalar.*got list"):
        to_tensorboard([])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs tensorboard; pip install"):
        to_tensorboard("runs")
