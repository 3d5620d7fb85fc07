"""One call between two training steps: teleport a Sequential in place on a batch, and its optimizer's state with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.data_dependent.losses import LossFunction
from teleport_fast.data_dependent.report import TeleportReport
from teleport_fast.data_dependent.state import carry_state_, reset_state_

STATES = ("carry", "reset", "keep")


def teleport_(
    model: nn.Sequential,
    inputs: Tensor,
    loss_fn: LossFunction,
    optimizer: Optimizer | None = None,
    *,
    state: str = "carry",
    second_moments: str = "keep",
    form: str = "u_exact",
    keep_null_space: bool = True,
    check: tuple[Tensor, LossFunction] | None = None,
    **options: Any,
) -> TeleportReport:
    """Teleports on inputs (batch, n), loss_fn of outputs (out, batch); `options` are MLPAction.teleport's: steps, lr, cap, radius, ...

    state: "carry" (carry_state_), "reset" (reset_state_) or "keep" (untouched, so it belongs to the old weights). check: more inputs
    and their loss; where the teleport more than doubles it (recheck_factor) everything stays as it was. ValueError as of its parts.

    >>> from teleport_fast.data_dependent import CrossEntropy
    >>> import torch; _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3)).double()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> teleport_(model, torch.randn(4, 6).double(), CrossEntropy(torch.arange(4) % 3), optimizer, steps=3).exact
    True
    """
    if state not in STATES:
        raise ValueError(f"state must be one of {', '.join(STATES)}, got {state!r}; pass one of these names")
    action = MLPAction.from_sequential(model, inputs, form, keep_null_space=keep_null_space)
    if check is not None:
        more, more_loss = check
        every = MLPAction.from_sequential(model, more, form)

        def recheck(weights: Sequence[Tensor]) -> Tensor:
            return more_loss(every.outputs(weights))

        options["recheck"] = recheck
    result = action.teleport(loss_fn, **options)
    if result.report.undone:
        return result.report
    # Before the weights: a state that cannot be carried must leave both as they were.
    if optimizer is not None and state == "carry":
        carry_state_(optimizer, model, action, result.report, second_moments)
    action.write_(model, result.weights)
    if optimizer is not None and state == "reset":
        reset_state_(optimizer, model)
    return result.report
