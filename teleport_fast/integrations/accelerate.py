"""accelerate: attach before or after `prepare`, and the teleporter in accelerate's own checkpoints."""

from __future__ import annotations

from typing import Any

from teleport_fast import optimizer as doors
from teleport_fast.integrations.attached import innermost
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.teleporter import Teleporter


def attach(accelerator: Any, optimizer: Any, symmetries: Symmetries, *args: Any, **kwargs: Any) -> Teleporter:
    """`tf.attach` for an optimizer that accelerate has wrapped or is going to wrap; other arguments are tf.attach's.

    `accelerator.save_state` and `load_state` carry the teleporter's memory along (`register_for_checkpointing`), the
    optimizer's state its step counter. A step within `accelerator.accumulate` that accelerate leaves out is no step.
    Plain `tf.attach` before `prepare` does the same without the memory.
    Errors: those of tf.attach; TypeError for an accelerator that is none. Source: own; tests/integrations/test_accelerate.py.
    """
    if not hasattr(accelerator, "register_for_checkpointing"):
        kind = type(accelerator).__name__
        raise TypeError(f"accelerator must be an accelerate.Accelerator, got {kind}; pass the one that prepares the optimizer")
    teleporter = doors.attach(innermost(optimizer), symmetries, *args, **kwargs)
    accelerator.register_for_checkpointing(teleporter)
    return teleporter
