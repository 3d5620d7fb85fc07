"""Statistics of two arms that ran the same seeds: mean, 95% interval and p of the paired t test, corrected where many are asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """What lies between two arms over `n` seeds; `low` to `high` is the 95% interval of the mean.

    By difference: arm − reference, 0 where they are level. By ratio: arm / reference, 1 where they are level, mean and
    interval those of the logarithms. Infinite where either diverged on a seed; not a number for the rest then.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float

    def below(self, level: float = 0.05) -> bool:
        """Whether the arm's loss is lower at this level of p (two-sided)."""
        return self.p < level and self.mean < self.neutral

    neutral: float = 0.0


def paired(arm: Sequence[float], reference: Sequence[float], by: str = "difference") -> Paired:
    """Student's paired t test of two lists of losses, seed by seed; `by` "difference" or "ratio".

    ValueError for lists of other lengths or an unknown `by`; ModuleNotFoundError with the remedy without scipy.

    >>> found = paired([1.0, 2.0, 3.0], [2.0, 3.5, 4.0])
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3), round(found.p, 4)
    (-1.167, -1.884, -0.45, 0.0198)
    """
    if len(arm) != len(reference) or not arm:
        raise ValueError(f"arm and reference must hold the same seeds, got {len(arm)} and {len(reference)} losses")
    if by not in ("difference", "ratio"):
        raise ValueError(f"by must be difference or ratio, got {by!r}; pass one of these names")
    ratio, n = by == "ratio", len(arm)
    neutral = 1.0 if ratio else 0.0
    if not all(map(math.isfinite, [*arm, *reference])):
        worse = math.inf if not all(map(math.isfinite, arm)) else (0.0 if ratio else -math.inf)
        return Paired(n, worse, math.nan, math.nan, math.nan, neutral)
    values = [_log(a) - _log(b) if ratio else a - b for a, b in zip(arm, reference, strict=True)]
    back = math.exp if ratio else float
    mean = sum(values) / n
    if n == 1:
        return Paired(n, back(mean), math.nan, math.nan, math.nan, neutral)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    if error == 0:
        return Paired(n, back(mean), back(mean), back(mean), 1.0 if mean == 0 else 0.0, neutral)
    t = _scipy().t(n - 1)
    reach = float(t.ppf(0.5 + LEVEL / 2)) * error
    return Paired(n, back(mean), back(mean - reach), back(mean + reach), float(2 * t.sf(abs(mean) / error)), neutral)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of several p values: the smallest times their number, and so on upwards; nan stays and counts.

    >>> holm([0.01, 0.5, 0.02])
    [0.03, 0.5, 0.04]
    """
    order = sorted(range(len(ps)), key=lambda i: (math.isnan(ps[i]), ps[i]))
    corrected, running = [math.nan] * len(ps), 0.0
    for place, i in enumerate(order):
        if math.isnan(ps[i]):
            continue
        running = max(running, min(1.0, ps[i] * (len(ps) - place)))
        corrected[i] = running
    return corrected


def _log(loss: float) -> float:
    # A loss of exactly 0 is float32's last word, not an infinite gain.
    return math.log(max(loss, 1e-38))


def _scipy() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the paired t test needs scipy; pip install scipy", name="scipy") from error
    return stats
