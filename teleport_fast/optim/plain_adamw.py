"""torch's AdamW over some parameters of a group, for optimizers that step the others in their own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from teleport_fast.distributed.gradient import gradient_part
from teleport_fast.distributed.layout import local_part, written


def begin(parameter: Tensor, state: dict[str, Any]) -> None:
    """torch's state of AdamW, where there is none yet."""
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


@torch.no_grad()
def plain_adamw_(parameters: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]], group: dict[str, Any]) -> None:
    """One step of torch.optim.AdamW of parameters that have gradients, with the group's lr, betas, eps, weight_decay.

    Of a parameter that is sharded each rank steps what it holds.
    """
    if not parameters:
        return
    for parameter in parameters:
        begin(parameter, states[parameter])
    first, second, steps = ([states[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq", "step"))
    adamw(
        [*map(local_part, parameters)],
        [gradient_part(p) for p in parameters if p.grad is not None],
        [*map(local_part, first)],
        [*map(local_part, second)],
        [],
        steps,
        has_complex=any(map(torch.is_complex, parameters)),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    written(parameters)
