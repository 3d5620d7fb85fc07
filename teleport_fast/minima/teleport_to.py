"""Teleports to flatter, sharper, more and less curved minima: steps along a measure's gradient in the Lie algebra."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.data_dependent.action import MLPAction, at
from teleport_fast.data_dependent.losses import LossFunction
from teleport_fast.data_dependent.moves import exponentials, move_if_finite
from teleport_fast.minima.measures import MeanCurvature, MeanSharpness, Measure
from teleport_fast.minima.pullback import lie_pullback

HALVINGS = 30
ARMIJO = 1e-4


@dataclass(frozen=True)
class MinimumReport:
    """What a teleport to another minimum did; `sizes`: ‖T‖_F of the accepted steps, the largest joint's; `stopped`: why it ended."""

    measure: str
    before: float
    after: float
    loss_before: float
    loss_after: float
    sizes: tuple[float, ...]
    stopped: str

    @property
    def loss_change(self) -> float:
        """|ΔL|/L."""
        return abs(self.loss_after - self.loss_before) / max(abs(self.loss_before), 1e-300)

    def __str__(self) -> str:
        return (f"{self.measure} {self.before:.6g} -> {self.after:.6g} in {len(self.sizes)} steps, "
                f"loss {self.loss_before:.6g} moved by {self.loss_change:.1e} of itself; {self.stopped}")


@dataclass(frozen=True)
class TeleportedTo:
    """`weights` after the teleport, one per layer, and the `report`."""

    weights: list[Tensor]
    report: MinimumReport


def teleport_to(
    action: MLPAction,
    loss_fn: LossFunction,
    measure: str | Measure = "sharpness",
    direction: str = "descend",
    steps: int = 10,
    *,
    radius: float = 0.5,
    subgroup: str = "full",
    loss_tolerance: float = 1e-6,
    generator: torch.Generator | None = None,
) -> TeleportedTo:
    """At most `steps` steps exp(T) along ± the measure's Lie-algebra gradient, ‖T‖_F ≤ radius each; the measure never ends worse.

    measure: "sharpness" (MeanSharpness.drawn), "curvature" (MeanCurvature.drawn) or a Measure, on the same draws throughout.
    direction: "descend" (flatter, less curved) or "ascend". A step is halved until the measure moves by 1e-4 of what its
    gradient says and the loss (of the outputs, (out, batch)) is within loss_tolerance of the start's, relatively: with a batch
    over the ranks few steps pass, and the report says so; inf lets them. subgroup "diagonal": M diagonal, which under a positively
    homogeneous σ, form "v_exact" and hidden outputs of full row rank is a symmetry for all inputs, not only the batch.
    ValueError for unknown names, radius or tolerance out of range, a measure or loss that is not finite. Source: [ICLR24] section 4.

    >>> W = [torch.randn(6, 5, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)]
    >>> action = MLPAction(W, torch.randn(5, 4, dtype=torch.float64))
    >>> report = teleport_to(action, lambda Y: Y.square().mean(), "curvature", "ascend").report
    >>> report.after > report.before and report.loss_change < 1e-6
    True
    """
    chosen = _check(action, loss_fn, measure, direction, steps, radius, subgroup, loss_tolerance, generator)
    sign = 1 if direction == "ascend" else -1
    loss = float(loss_fn(action.outputs()))
    if not math.isfinite(loss):
        raise ValueError(f"loss_fn must be finite before the teleport, got {loss}; check the weights")
    here, size, sizes, stopped = action, radius, [], "all steps done"
    before = value = math.nan
    for step in range(steps):
        value, gradients = chosen.gradient(here)
        before = value if step == 0 else before
        if not math.isfinite(value):
            raise ValueError(f"{chosen.name} must be finite before the teleport, got {value}; take smaller radii")
        Ms = lie_pullback(here, gradients)
        Ms = [M.diagonal().diag() for M in Ms] if subgroup == "diagonal" else Ms
        largest = max(float(torch.linalg.vector_norm(M)) for M in Ms)
        slope = sum(float(M.square().sum()) for M in Ms)
        if not 0 < largest < math.inf:
            stopped = f"the Lie-algebra gradient is {largest:g}"
            break
        for _ in range(HALVINGS):
            t = size / largest
            there = _moved(here, [sign * t * M for M in Ms])
            if there is not None and abs(float(loss_fn(there.outputs())) - loss) <= loss_tolerance * abs(loss):
                found = chosen.value(there)
                if sign * (found - value) >= ARMIJO * t * slope:
                    break
            size /= 2
        else:
            stopped = f"no step of {HALVINGS} halvings moves the {chosen.name} and keeps the loss to {loss_tolerance:g}"
            break
        here, value = there, found
        sizes.append(size)
        size = min(2 * size, radius)
    if not sizes and steps == 0:
        before = value = chosen.value(action)
    after = float(loss_fn(here.outputs()))
    report = MinimumReport(chosen.name, before, value, loss, after, tuple(sizes), stopped)
    return TeleportedTo(here.weights, report)


def _check(
    action: MLPAction,
    loss_fn: LossFunction,
    measure: str | Measure,
    direction: str,
    steps: int,
    radius: float,
    subgroup: str,
    loss_tolerance: float,
    generator: torch.Generator | None,
) -> Measure:
    if direction not in ("ascend", "descend"):
        raise ValueError(f"direction must be 'ascend' or 'descend', got {direction!r}")
    if subgroup not in ("full", "diagonal"):
        raise ValueError(f"subgroup must be 'full' or 'diagonal', got {subgroup!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}; 10 is the default")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}; it bounds ‖T‖ of a step, 0.5 is the default")
    if not loss_tolerance >= 0:
        raise ValueError(f"loss_tolerance must not be negative, got {loss_tolerance}; 1e-6 is the default, inf accepts any loss")
    if measure == "sharpness":
        return MeanSharpness.drawn(action, loss_fn, generator=generator)
    if measure == "curvature":
        return MeanCurvature.drawn(action, generator=generator)
    if isinstance(measure, str):
        raise ValueError(f"measure must be 'sharpness', 'curvature' or a Measure, got {measure!r}")
    return measure


def _moved(action: MLPAction, Ts: list[Tensor]) -> MLPAction | None:
    """The action at exp(T)·w; None where the move leaves the finite numbers."""
    moved = move_if_finite(action._network(), *exponentials(Ts, action.form), action._shared())
    if moved is None:
        return None
    weights = action._weights(moved.net.Z0, moved.net.tail, moved.lead)
    return at(action, weights) if all(bool(torch.isfinite(W).all()) for W in weights) else None
