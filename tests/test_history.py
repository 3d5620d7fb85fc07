"""A history as a table, a text and a picture: what is read back is what was recorded."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import teleport_fast as tf
from teleport_fast.history import COLUMNS
from teleport_fast.record import Pending
from teleport_fast.symmetry import GeneralLinear

RECORDS = tf.History(
    [
        tf.TeleportRecord(3, 1.0, 2.5, 0.5, 0.01, 4, 1.6),
        tf.TeleportRecord(6, 0.1, math.inf, 0.25, 1e-7, 1, 1.0),
        tf.TeleportRecord(10**12, -1.5, 0.0, 0.0, 3.0, 0, 123456.789),
    ]
)


def run(schedule: tf.Schedule, **options: Any) -> tuple[tf.Teleporter, Callable[[int], None]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    views = tf.View("0.weight", 0, 1, 4), tf.View("1.weight", 1, 1, 4)
    joint = tf.Joint("joint", "test", GeneralLinear(4), 1, 4, (views[0],), (views[1],))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    teleporter = tf.attach(optimizer, tf.Symmetries((joint,), model=model), schedule=schedule, **options)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(6, 4, dtype=torch.float64)).square().mean().backward()
            optimizer.step()

    return teleporter, train


def test_json_gives_the_same_records_back_from_text_and_from_a_file(tmp_path: Path) -> None:
    text = RECORDS.to_json(tmp_path / "history.json")
    assert tf.History.from_json(text) == tf.History.from_json(tmp_path / "history.json") == RECORDS
    assert "Infinity" not in text and "NaN" not in text
    without = tf.History([tf.TeleportRecord(0, math.nan, -math.inf, 0.5, 0.01, 1)])
    (back,) = tf.History.from_json(without.to_json())
    assert math.isnan(back.objective_before) and back.objective_after == -math.inf and math.isnan(back.condition)
    assert tf.History.from_json(tf.History().to_json()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3", "source is no JSON"),
        ('{"step": 3}', "must be a JSON array of objects"),
        ('[{"step": 3}]', "row 0 has no 'objective_before'"),
    ],
)
def test_what_is_no_history_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tf.History.from_json(text)


def test_pandas_has_the_fields_as_columns_and_gives_the_records_back() -> None:
    pytest.importorskip("pandas", reason="needs pandas; pip install -r requirements/dev.txt")
    frame = RECORDS.to_pandas()
    assert list(frame.columns) == list(COLUMNS) == list(tf.History().to_pandas().columns)
    assert frame["step"].tolist() == [3, 6, 10**12] and frame["joints"].dtype.kind == "i"
    assert tf.History.from_rows(frame.to_dict("records")) == RECORDS


@pytest.mark.parametrize("package", ["pandas", "matplotlib.figure"])
def test_a_missing_package_is_named_with_the_command(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"needs (pandas|matplotlib); pip install 'teleport-fast\["):
        RECORDS.to_pandas() if package == "pandas" else RECORDS.plot()


def test_the_picture_shows_every_teleport(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib; pip install -r requirements/dev.txt")
    records = tf.History(RECORDS[:1])
    figure = records.plot(tmp_path / "history.png")
    objective, far, cost = figure.axes
    assert [list(line.get_ydata()) for line in objective.lines] == [[1.0], [2.5]]
    assert [list(line.get_ydata()) for line in far.lines] == [[0.5], [1.6]]
    assert [list(line.get_ydata()) for line in cost.lines] == [[10.0]]
    assert objective.get_yscale() == "log" and (tmp_path / "history.png").stat().st_size > 1000
    assert tf.History(RECORDS[2:]).plot().axes[0].get_yscale() == "linear"
    assert len(tf.History().plot().axes) == 3


def test_a_teleporter_gives_what_its_callback_saw_and_the_condition_of_its_element() -> None:
    seen: list[tf.TeleportRecord] = []
    teleporter, train = run(tf.Every(2), radius=0.3, on_teleport=seen.append)
    train(7)
    assert isinstance(teleporter.history, tf.History) and teleporter.history == seen
    assert tf.History.from_json(teleporter.history.to_json()) == seen
    other, train = run(tf.Every(2), radius=0.3)
    train(7)
    assert [r.objective_after for r in other.history] == [r.objective_after for r in seen]
    assert all(math.isnan(record.condition) for record in other.history)
    other.with_condition = True
    train(2)
    assert other.history[-1].condition > 1
    # exp of a symmetric matrix of Frobenius norm 0.3 has a condition number between 1 and e^(0.3 √2)
    assert all(1.05 < record.condition < math.exp(0.3 * math.sqrt(2)) for record in seen)


def test_nothing_is_read_off_the_device_before_somebody_asks_and_then_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    plain = Pending.read
    monkeypatch.setattr(Pending, "read", lambda self: reads.append(self.step) or plain(self))
    teleporter, train = run(tf.Every(2))
    train(7)
    assert reads == []
    assert teleporter.history == teleporter.history and reads == [2, 4, 6]
    train(2)
    assert [record.step for record in teleporter.history] == [2, 4, 6, 8] == reads
