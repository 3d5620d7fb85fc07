"""The largest loss in a ball around the parameters, by projected gradient ascent."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from teleport_fast.minima.directions import sphere_directions
from teleport_fast.minima.point import Closure, Point


def worst_sharpness(
    loss_fn: Closure,
    params: Iterable[Tensor],
    radius: float,
    steps: int = 20,
    starts: int = 3,
    generator: torch.Generator | None = None,
) -> float:
    """The largest L(w + d) found with ‖d‖ ≤ radius: a lower bound of the maximum; params are bit-identical afterwards.

    From each random point of the sphere, d ← projection of d + s ∇L/‖∇L‖ with s falling from radius to 0. Starting on the
    sphere, because at a minimum the gradient is 0. ValueError for a radius, steps or starts that are not positive.

    >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    >>> round(worst_sharpness(lambda: 3 * w[0] ** 2 + w[1] ** 2, [w], 0.5), 3)
    0.75
    """
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius must be positive and finite, got {radius}; pass for example 0.1")
    if steps < 1 or starts < 1:
        raise ValueError(f"steps and starts must be at least 1, got {steps} and {starts}; the defaults are 20 and 3")
    with Point(params) as point:
        worst, _ = point.gradient(loss_fn)
        for start in sphere_directions(point.params, starts, generator):
            d = radius * start
            for step in range(steps + 1):
                point.move(d, 1.0)
                loss, gradient = point.gradient(loss_fn)
                # A loss that overflows inside the ball is the answer; comparisons with NaN would hide it.
                worst = loss if loss != loss else max(worst, loss)
                norm = float(torch.linalg.vector_norm(gradient))
                if worst != worst or not 0 < norm < float("inf"):
                    break
                d = d + gradient * (radius * (1 - step / steps) / norm)
                d = d * (radius / max(radius, float(torch.linalg.vector_norm(d))))
    return worst
