"""The records of a teleporter as a list that is also a table, a text that can be read back, and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from teleport_fast.record import TeleportRecord

COLUMNS = tuple(field.name for field in dataclasses.fields(TeleportRecord))
WHOLE = ("step", "joints")
PANDAS = "the table needs pandas; pip install 'teleport-fast[logging]' (or: pip install pandas)"


class History(list[TeleportRecord]):
    """Teleports, oldest first: a list of TeleportRecord that `teleporter.history` makes anew at every call.

    Source: own; tests/test_history.py.

    >>> history = History([tf.TeleportRecord(100, 1.0, 1.5, 0.5, 0.01, 4, 1.6)])
    >>> History.from_json(history.to_json()) == history
    True
    """

    def to_rows(self) -> list[dict[str, Any]]:
        """One dictionary per record, with the fields of TeleportRecord."""
        return [dataclasses.asdict(record) for record in self]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> History:
        """Records from what `to_rows` gives, or `frame.to_dict("records")`. Errors: ValueError that names the missing field."""
        return cls(_record(number, row) for number, row in enumerate(rows))

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row per record. Errors: ModuleNotFoundError that says how to install pandas."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(PANDAS, name=error.name) from error
        return pandas.DataFrame(self.to_rows(), columns=list(COLUMNS))

    def to_json(self, path: Path | None = None) -> str:
        """A JSON array with an object per record, also written to `path`; nan and infinities become strings."""
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.to_rows()]
        text = json.dumps(rows, indent=1, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> History:
        """What `to_json` wrote: its text, or the Path of the file. Errors: ValueError for what it did not write."""
        text = source.read_text() if isinstance(source, Path) else source
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"source is no JSON ({error}); pass the text of to_json(), or the Path of its file") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"source must be a JSON array of objects, as to_json() writes it, got {text[:40]!r}")
        return cls.from_rows(rows)

    def plot(self, path: Path | None = None) -> Any:
        """A matplotlib Figure: the objective before and after each teleport, how far it went, what it cost.

        path: where it is saved as well. Errors: ModuleNotFoundError that says how to install matplotlib.
        """
        from teleport_fast.history_picture import draw

        return draw(self, path)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _record(number: int, row: Mapping[str, Any]) -> TeleportRecord:
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise ValueError(f"row {number} has no {missing[0]!r}; rows are those of to_rows(), with {', '.join(COLUMNS)}")
    values: dict[str, Any] = {name: int(row[name]) if name in WHOLE else float(row[name]) for name in COLUMNS}
    return TeleportRecord(**values)
