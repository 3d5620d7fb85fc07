"""What to look for: the objectives a teleport may have, by name."""

from __future__ import annotations

from collections.abc import Callable

from teleport_fast.objectives.balance import Balance
from teleport_fast.objectives.base import Move, Objective
from teleport_fast.objectives.dual_norm import GradL1, GradNorm
from teleport_fast.objectives.eigenbasis import Eigenbasis, RandomRotation
from teleport_fast.objectives.fixed import Fixed
from teleport_fast.objectives.ratio import Ratio
from teleport_fast.objectives.scaled import Scaled

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "eigenbasis": Eigenbasis,
    "random": RandomRotation,
    "grad_norm": GradNorm,
    "grad_l1": GradL1,
    "balance": Balance,
    "ratio": Ratio,
    "scaled": Scaled,
}


def make_objective(objective: str | Objective) -> Objective:
    """An objective from its name, or the object itself. Errors: ValueError for an unknown name."""
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)} or an Objective, got {objective!r}")
    return OBJECTIVES[objective]()


__all__ = [
    "OBJECTIVES",
    "Balance",
    "Eigenbasis",
    "Fixed",
    "GradL1",
    "GradNorm",
    "Move",
    "Objective",
    "RandomRotation",
    "Ratio",
    "Scaled",
    "make_objective",
]
