"""What a study of `python -m teleport_fast reproduce` is given and what it hands back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Bar = Callable[[Iterable[T], str], Iterable[T]]
# Student's 97.5% quantile for 1 to 15 degrees of freedom; beyond, Cornish and Fisher's expansion is good to three digits.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Options:
    """`quick`: under 30 seconds; `seeds`: one run each; `data`: folder of local data sets; `say`: one line of progress.

    >>> Options(quick=True, seeds=(0,)).seeds
    (0,)
    """

    quick: bool = False
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    data: Path | None = None
    say: Callable[[str], None] = lambda line: None
    bar: Bar[Any] | None = None

    def track(self, items: Iterable[T], text: str) -> Iterator[T]:
        """The items, with a progress bar where the caller has one and a line at the start elsewhere."""
        if self.bar is None:
            self.say(text)
            yield from items
        else:
            yield from self.bar(items, text)


@dataclass(frozen=True)
class Sample:
    """One value a seed, printed as mean ± sd.

    >>> print(Sample((1.0, 3.0)), Sample((2.0,)), Sample((1.0, math.inf)))
    2 ± 1.4 2 diverged (1 of 2)
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values must hold at least one number, got (); leave the cell out")

    @property
    def mean(self) -> float:
        """The mean; inf where a run diverged."""
        return statistics.fmean(self.values) if self.finite else math.inf

    @property
    def sd(self) -> float:
        """The sample standard deviation; nan of one value."""
        return statistics.stdev(self.values) if self.finite and len(self.values) > 1 else math.nan

    @property
    def median(self) -> float:
        """The median; nan counts as inf."""
        return statistics.median(math.inf if math.isnan(value) else value for value in self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95% interval of the mean."""
        n = len(self.values)
        if n < 2:
            return math.nan, math.nan
        quantile = QUANTILES[n - 2] if n - 2 < len(QUANTILES) else 1.96 + 2.372 / (n - 1) + 2.823 / (n - 1) ** 2
        half = quantile * self.sd / math.sqrt(n)
        return self.mean - half, self.mean + half

    @property
    def finite(self) -> bool:
        """Whether no run diverged."""
        return all(map(math.isfinite, self.values))

    def __str__(self) -> str:
        if not self.finite:
            lost = sum(not math.isfinite(value) for value in self.values)
            return f"diverged ({lost} of {len(self.values)})"
        return number(self.mean) + (f" ± {self.sd:.2g}" if len(self.values) > 1 else "")


Cell = str | float | Sample


@dataclass(frozen=True)
class Table:
    """A title, a name a column, and rows of as many cells; ValueError for a row of another length."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows must have {len(self.columns)} cells like columns, got {len(row)}: {row}")


@dataclass(frozen=True)
class Curve:
    """`runs`: one list of y a seed, over the same x; a shorter run ended early."""

    label: str
    x: tuple[float, ...]
    runs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: names of x and y, curves, and whether y is logarithmic or the runs are points."""

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    log_y: bool = False
    scatter: bool = False


@dataclass(frozen=True)
class Claim:
    """What was claimed, the number measured here, the bar, and whether it holds."""

    text: str
    measured: str
    bar: str
    holds: bool


@dataclass(frozen=True)
class Outcome:
    """All of a study; `source`: paper and section, figure or table."""

    name: str
    title: str
    source: str
    settings: dict[str, object]
    tables: tuple[Table, ...]
    panels: tuple[Panel, ...]
    claims: tuple[Claim, ...]


def number(value: float) -> str:
    """Four digits.

    >>> number(0.123456), number(3.5e-9), number(math.inf), number(7)
    ('0.1235', '3.5e-09', 'inf', '7')
    """
    return f"{value:.4g}"
