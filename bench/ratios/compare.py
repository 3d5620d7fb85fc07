"""What got better or worse since a recorded run, beyond both runs' spread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Quartiles can lie close together by chance: less than this is never called a change.
SMALLEST = 0.05
Run = dict[str, Any]


def speeds(run: Run) -> Iterator[tuple[str, dict[str, float]]]:
    """(op, dtype, size and route; its speed over torch's) of every measured route."""
    for row in run["rows"]:
        for route, found in row["routes"].items():
            if route not in ("torch", "reference"):
                yield f"{row['op']} {row['dtype']} {row['size']} {route}", found["speed"]


def verdict(new: dict[str, float], old: dict[str, float]) -> str:
    """"better" or "worse" where the quartiles do not meet and the medians are 5% apart, else "".

    >>> verdict({"low": 2.0, "median": 2.1, "high": 2.2}, {"low": 1.0, "median": 1.1, "high": 1.2})
    'better'
    """
    change = new["median"] / old["median"] - 1
    if new["low"] > old["high"] and change > SMALLEST:
        return "better"
    if new["high"] < old["low"] and 1 / (1 + change) - 1 > SMALLEST:
        return "worse"
    return ""


def changes(new: Run, old: Run) -> list[str]:
    """Lines for what changed, the worst first, and one for how many did not; another instruction set is said first."""
    before = dict(speeds(old))
    lines, same = [], 0
    for name, speed in speeds(new):
        if name not in before:
            continue
        word = verdict(speed, before[name])
        same += not word
        if word:
            shown = [f"{s['median']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in (before[name], speed)]
            lines.append((speed["median"] / before[name]["median"], f"{word:7} {name}: {shown[0]} -> {shown[1]} of torch's speed"))
    told = [line for _, line in sorted(lines)]
    if new["machine"]["isa"] != old["machine"]["isa"]:
        told.insert(0, f"recorded on {old['machine']['isa']}, measured on {new['machine']['isa']}: not the same kernels")
    return [*told, f"{len(lines)} of {len(lines) + same} routes changed beyond their spread"]
