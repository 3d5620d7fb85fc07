"""Teleports in TensorBoard, or in anything with its `add_scalar`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from teleport_fast.record import TeleportRecord

NEEDED = "writing for TensorBoard needs tensorboard; pip install 'teleport-fast[logging]' (or: pip install tensorboard)"


def to_tensorboard(writer: Any, prefix: str = "teleport") -> Callable[[TeleportRecord], None]:
    """What `attach(on_teleport=...)` takes: a curve per field of the record, `prefix`/objective_before and so on.

    writer: a torch.utils.tensorboard SummaryWriter, anything else with `add_scalar(tag, value, step)`, or a folder, for
    which a writer is made. Errors: TypeError for what has no `add_scalar`; ModuleNotFoundError that says how to install
    tensorboard. Source: own; tests/integrations/test_tensorboard.py.
    """
    if isinstance(writer, (str, Path)):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(NEEDED, name="tensorboard") from error
        writer = SummaryWriter(str(writer))
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"writer must have add_scalar(tag, value, step), got {type(writer).__name__}; pass a SummaryWriter")

    def write(record: TeleportRecord) -> None:
        for name, value in dataclasses.asdict(record).items():
            if name != "step":
                writer.add_scalar(f"{prefix}/{name}", value, record.step)

    return write
