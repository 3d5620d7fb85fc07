"""Muon, the peer that orthogonalises every matrix's update: torch's own, with AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

# The second moment's decay for embeddings and head: 0.98 was better than AdamW's own 0.95 in one run each at momentum 0.8.
TABLE_BETA2 = 0.98


class Together(Optimizer):
    """Several optimizers of disjoint parameters that step as one; `param_groups` are theirs, in order."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for group in o.param_groups for p in group["params"]], {})
        # the same dictionaries: a scheduler that sets a rate here sets it there
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each, after the closure, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def muon(groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    """torch.optim.Muon (its own Nesterov momentum and five Newton-Schulz steps) over the matrices of the first group.

    All else, embeddings and head in the second group too, is AdamW's at the second group's rate, with the same first-moment
    decay, as in the other arms. Without weight decay, like them.

    >>> weight, table = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
    >>> optimizer = muon([{"params": [("w", weight)]}, {"params": [("t", table)], "lr": 0.01}], lr=0.02, momentum=0.9)
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.02, 0.01]
    """
    blocks, tables = groups
    matrices = [(name, p) for name, p in blocks["params"] if p.ndim == 2]
    rest = [(name, p) for name, p in blocks["params"] if p.ndim != 2] + tables["params"]
    return Together(
        torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=tables["lr"], betas=(momentum, TABLE_BETA2), weight_decay=0.0),
    )
