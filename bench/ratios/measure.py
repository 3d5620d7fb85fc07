"""Measures a case: every backend, torch's own route, a copy of as many bytes and the BLAS take turns; only ratios are kept."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bench.ops.prefer import cpu_name
from bench.ratios.cases import Case
from teleport_fast.experiments.report import versions
from teleport_fast.experiments.timing import Calls, interleaved, ratios, repeated, spread
from teleport_fast.ops.backend import availability, set_backend

# A square product at the BLAS's best.
PRODUCT = 512
# Calls shorter than this are timed in bundles.
BUNDLE = 1e-3
YARDSTICKS = ("clone", "copy", "blas")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    isa = torch.ops.teleport_fast_cpp.isa() if availability("cpp") is True else "no extension"
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {**versions(), "cpu": cpu_name(), "isa": isa, "load": load, "clock": "thread CPU time, one thread"}


def usable() -> list[str]:
    """The backends that compute on a CPU here, and "auto"."""
    return [name for name in ("cpp",) if availability(name) is True] + ["auto"]


def yardsticks(case: Case) -> Calls:
    """clone and copy_ of as many bytes as the case moves, and a square product."""
    source = torch.zeros(max(1, case.bytes // 8))
    target = torch.empty_like(source)
    square = torch.randn(PRODUCT, PRODUCT, dtype=torch.float64 if case.dtype == "float64" else torch.float32)
    return {"clone": source.clone, "copy": lambda: target.copy_(source), "blas": lambda: torch.mm(square, square)}


def times(case: Case, backends: Sequence[str], others: Calls, rounds: int, least: float) -> dict[str, list[float]]:
    """Seconds of one call by round: of torch's own route, of the backends that can compute the case, and of the other calls."""
    under = {"torch": "reference", **{name: name for name in backends}}
    calls: Calls = {**dict.fromkeys(under, case.call), **others}
    if case.by_torch is not None:
        calls["torch"] = case.by_torch

    def around(name: str) -> AbstractContextManager[Any]:
        return set_backend(under[name]) if name in under else nullcontext()

    bundles: Calls = {}
    counts: dict[str, int] = {}
    for name, call in calls.items():
        with around(name):
            try:
                bundles[name], counts[name] = repeated(call, BUNDLE)
            except RuntimeError as reason:
                if "cannot compute" not in str(reason):
                    raise
    found = interleaved(bundles, rounds, least=least, around=around)
    return {name: [value / counts[name] for value in values] for name, values in found.items()}


def measure(case: Case, backends: Sequence[str], rounds: int = 5, least: float = 1.0) -> dict[str, Any]:
    """A row: by route its speed over torch's, over clone's and copy_'s bytes a second, its share of the BLAS's flops and of the roof.

    `baseline`: the faster of torch's own route and the op's plain reference, whose speed is the one. The roof is the longer of a copy of
    as many bytes and the BLAS's time for as many operations, in the same round. `intensity` is the second over the first: under 1,
    memory is the bound.
    """
    routes_here = (*backends, "reference") if case.by_torch is not None else backends
    found = times(case, routes_here, yardsticks(case), rounds, least)
    by_blas = [value * case.flops / (2.0 * PRODUCT**3) for value in found["blas"]]
    roofs = [max(pair) for pair in zip(found["copy"], by_blas, strict=True)]
    baseline = min((name for name in ("torch", "reference") if name in found), key=lambda name: statistics.median(found[name]))
    routes = {}
    for name, own in found.items():
        if name in YARDSTICKS:
            continue
        routes[name] = {
            "speed": rounded(spread(ratios(found, name, baseline))),
            "over_clone": rounded(spread(ratios(found, name, "clone"))),
            "over_copy": rounded(spread(ratios(found, name, "copy"))),
            "of_blas": rounded(spread([b / a for a, b in zip(own, by_blas, strict=True)])),
            "of_roof": rounded(spread([b / a for a, b in zip(own, roofs, strict=True)])),
        }
    intensity = spread([b / a for a, b in zip(found["copy"], by_blas, strict=True)])
    return {
        "op": case.op, "dtype": case.dtype, "size": case.size, "bytes": case.bytes, "flops": case.flops, "baseline": baseline,
        "rounds": len(found["copy"]), "intensity": rounded(intensity), "routes": routes,
    }  # fmt: skip


def rounded(found: dict[str, float]) -> dict[str, float]:
    """Four digits: more than a measurement carries."""
    return {key: float(f"{value:.4g}") for key, value in found.items()}


def run(cases: Iterable[Case], rounds: int, least: float, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of the cases, one line told for each."""
    rows = []
    for case in cases:
        with torch.no_grad():
            row = measure(case, usable(), rounds, least)
        rows.append(row)
        shown = ", ".join(
            f"{name} {found['speed']['median']:.2f} [{found['speed']['low']:.2f}, {found['speed']['high']:.2f}]"
            for name, found in row["routes"].items() if name != row["baseline"]
        )  # fmt: skip
        best = row["routes"].get("cpp", row["routes"]["torch"])
        tell(f"{case.op:26} {case.dtype:8} {case.size:22} over torch: {shown}; of the roof {best['of_roof']['median']:.2f}")
    return rows
