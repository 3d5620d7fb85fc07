"""What a data-dependent move did and what it cost: ranks, the change of the outputs, the loss, the objective, step by step."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor


class RankWarning(UserWarning):
    """The batch is larger than the space that would have to absorb it: the move is no symmetry on this batch."""


class RoundOffWarning(UserWarning):
    """The teleport moved weights or objective by no more than the dtype's rounding."""


@dataclass(frozen=True)
class MoveReport:
    """`exact`: every rank equals the batch and g⁻¹ is exact; `output_change` is ‖Y' − Y‖/‖Y‖, measured on the batch."""

    exact: bool
    batch: int
    ranks: tuple[int, ...]
    factorisations: tuple[str, ...]
    output_change: float
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def loss_change(self) -> float | None:
        """L' − L, where a loss was given."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before

    def __str__(self) -> str:
        cost = "" if self.loss_before is None else f", loss {self.loss_before:.6g} -> {self.loss_after:.6g}"
        kind = "exact" if self.exact else f"not exact (ranks {list(self.ranks)} for a batch of {self.batch})"
        return f"{kind}: outputs moved by {self.output_change:.1e} of their norm{cost}"

    def warn(self, stacklevel: int = 3) -> None:
        """RankWarning with the measured cost, where ranks fall short of the batch."""
        if any(rank < self.batch for rank in self.ranks):
            warnings.warn(f"the batch exceeds the rank of the pseudo-inverted matrices; {self}", RankWarning, stacklevel + 1)


@dataclass(frozen=True)
class StepRecord:
    """One step: loss and J before it, T by joint, the share of lr that the line search took."""

    loss: float
    objective: float
    T: list[Tensor]
    scale: float


@dataclass(frozen=True)
class TeleportReport(MoveReport):
    """MoveReport of a whole teleport; `stopped`: why it ended; `undone`: the recheck refused it, the weights are the old ones.

    `group` is "exp" or "linear" for steps exp(T) or I + T, "published" for a published loop.
    """

    objective_before: float = 0.0
    objective_after: float = 0.0
    steps: list[StepRecord] = field(default_factory=list)
    stopped: str = "all steps done"
    at_round_off: bool = False
    recheck_before: float | None = None
    recheck_after: float | None = None
    undone: bool = False
    group: str = "exp"

    def elements(self) -> list[list[Tensor]]:
        """g of each step that moved, by joint; ValueError for a published loop, whose steps are none of a group."""
        if self.group == "published":
            raise ValueError("a published loop's steps (parity) are no group elements, so nothing can be carried; reset the state")
        moving = [step.T for step in self.steps if step.T]
        if self.group == "exp":
            return [[torch.linalg.matrix_exp(T) for T in Ts] for Ts in moving]
        return [[T + torch.eye(len(T), dtype=T.dtype, device=T.device) for T in Ts] for Ts in moving]


@dataclass(frozen=True)
class Teleported:
    """`weights` after the teleport, one per layer, and the `report`."""

    weights: list[Tensor]
    report: TeleportReport
