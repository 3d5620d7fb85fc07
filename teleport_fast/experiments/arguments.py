"""Arguments of the command line that more than one verb reads."""

from __future__ import annotations

from typing import Any


def numbers(name: str, listed: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """The numbers in a list separated by commas.

    >>> numbers("seeds", "0, 1", int)
    (0, 1)
    """
    try:
        return tuple(kind(part) for part in listed.split(","))
    except ValueError:
        example = "0,1" if kind is int else "0.001,0.002"
        raise ValueError(f"{name} must be numbers separated by commas, got {listed!r}; for example {example}") from None


def positive(name: str, value: int) -> int:
    """`value` if it is at least 1; ValueError otherwise."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; pass a positive integer")
    return value
