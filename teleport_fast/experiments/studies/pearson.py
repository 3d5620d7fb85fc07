"""Pearson's r with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 10_000


@dataclass(frozen=True)
class Correlation:
    """r of n pairs and the 95% interval of its bootstrap distribution (pairs redrawn, percentiles).

    >>> print(Correlation(0.5, 0.25, 0.75, 30))
    0.50 (0.25 to 0.75)
    """

    r: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.r:.2f} ({self.low:.2f} to {self.high:.2f})"


def correlate(
    x: Sequence[float], y: Sequence[float], given: Sequence[float] | None = None, draws: int = DRAWS, seed: int = 0
) -> Correlation:
    """Correlation of x and y, or of what a line in `given` leaves of both: (r_xy − r_xz r_yz)/√((1 − r_xz²)(1 − r_yz²)).

    ValueError for fewer than four pairs, values that are not finite, and a side that does not vary.

    >>> correlate([1, 2, 3, 4], [2, 4, 6, 8]).r
    1.0
    """
    sides = [torch.tensor(list(values), dtype=torch.float64) for values in ((x, y) if given is None else (x, y, given))]
    n = len(sides[0])
    if n < 4 or any(len(side) != n for side in sides):
        raise ValueError(f"x, y and given must hold the same number of values, at least 4, got {[len(side) for side in sides]}")
    if not all(bool(torch.isfinite(side).all()) for side in sides):
        raise ValueError("x, y and given must be finite, got NaN or infinity; leave diverged runs out")
    if any(float(side.std()) == 0 for side in sides):
        raise ValueError("x, y and given must vary, got one value throughout, for which r is not defined")
    index = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    redrawn = _partial([side[index] for side in sides])
    # A draw of one pair alone has no r.
    low, high = torch.quantile(redrawn[torch.isfinite(redrawn)], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Correlation(float(_partial(sides)), low, high, n)


def _partial(sides: list[Tensor]) -> Tensor:
    r = _r(sides[0], sides[1])
    if len(sides) == 2:
        return r
    first, second = _r(sides[0], sides[2]), _r(sides[1], sides[2])
    return ((r - first * second) / ((1 - first.square()) * (1 - second.square())).sqrt()).clamp(-1, 1)


def _r(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return ((a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()).clamp(-1, 1)
