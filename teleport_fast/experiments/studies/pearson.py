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


def correlate(x: Sequence[float], y: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Correlation:
    """Correlation of x and y; ValueError for fewer than four pairs, values that are not finite, and a side that does not vary.

    >>> correlate([1, 2, 3, 4], [2, 4, 6, 8]).r
    1.0
    """
    a, b = (torch.tensor(list(values), dtype=torch.float64) for values in (x, y))
    if a.shape != b.shape or len(a) < 4:
        raise ValueError(f"x and y must hold the same number of values, at least 4, got {len(a)} and {len(b)}")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("x and y must be finite, got NaN or infinity; leave diverged runs out")
    if float(a.std()) == 0 or float(b.std()) == 0:
        raise ValueError("x and y must vary, got one value throughout, for which r is not defined")
    index = torch.randint(len(a), (draws, len(a)), generator=torch.Generator().manual_seed(seed))
    redrawn = _r(a[index], b[index])
    # A draw of one pair alone has no r.
    low, high = torch.quantile(redrawn[torch.isfinite(redrawn)], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Correlation(float(_r(a, b)), low, high, len(a))


def _r(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return ((a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()).clamp(-1, 1)
