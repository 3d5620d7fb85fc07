"""Which optimizers can be teleported, and what the others are told."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

# Where optimizers that train in half precision keep the weights that they really step (apex, DeepSpeed, fairscale).
MASTER_WEIGHTS = (
    "param_groups_master",
    "fp32_from_fp16_groups",
    "fp32_groups_flat_partition",
    "single_partition_of_fp32_groups",
    "fp32_params",
    "_amp_stash",
)


def check_base(optimizer: object) -> None:
    """Raise TypeError, with the remedy, for what a teleporter cannot be put around."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}; pass AdamW(...)")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates its closure several times a step and cannot be teleported; use SGD or AdamW")
    if is_schedulefree(optimizer) and kind.endswith("Closure"):
        raise TypeError(f"{kind} moves the weights before it evaluates its closure; use {kind.removesuffix('Closure')}")
    if getattr(optimizer, "teleports_itself", False):
        raise TypeError(f"{kind} turns to bases of its own within its step; step it as it is, or teleport another optimizer")
    # asked of a wrapper that forwards attributes this gives the inner optimizer's, whose hooks are as good
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(f"{kind} has no step hooks; attach to the optimizer that it wraps, before it is wrapped (prepare)")
    for name in MASTER_WEIGHTS:
        if getattr(optimizer, name, None) is not None:
            raise TypeError(
                f"{kind} keeps the weights that it steps in {name!r}, outside its state, and a teleport would miss them; "
                f"use autocast with float32 weights"
            )


def is_schedulefree(optimizer: Optimizer) -> bool:
    """Whether the optimizer's state `z` is a point of weight space (Defazio et al., arXiv 2405.15682)."""
    return type(optimizer).__module__.partition(".")[0] == "schedulefree"
