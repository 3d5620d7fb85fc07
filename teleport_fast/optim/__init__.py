"""Optimizers with the move fused into the step."""

from teleport_fast.optim.adamw import AdamW
from teleport_fast.optim.rotated import Rotated

__all__ = ["AdamW", "Rotated"]
