"""Fails where a CPU kernel has become much slower beside torch's own route than the committed run has it.

    python -m bench.ratios.guard

float32 at the middle size, CPU time of one thread, medians of interleaved rounds. A kernel may have 0.6 of its recorded ratio; one that
seems to have less is measured twice more, longer, before it counts. Instructions are not counted: valgrind (3.19) has no AVX-512, so it
would count other kernels than those that run, and torch alone takes minutes to import under it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.ratios.cases import Case, cases
from bench.ratios.measure import machine, times
from teleport_fast.experiments.timing import ratios, spread

RECORDED = Path(__file__).resolve().parent.parent / "recorded" / "ratios.json"
ALLOWED = 0.6
# (rounds, least seconds of all routes together) of each attempt.
ATTEMPTS = ((5, 0.05), (9, 0.3), (15, 1.0))


def recorded(run: dict[str, Any], backend: str = "cpp") -> dict[str, tuple[str, float]]:
    """By the name of the case: its plain baseline, and the backend's median speed over that."""
    return {
        f"{row['op']} {row['dtype']} {row['size']}": (row["baseline"], row["routes"][backend]["speed"]["median"])
        for row in run["rows"] if backend in row["routes"]
    }  # fmt: skip


def speed(case: Case, baseline: str, rounds: int, least: float, backend: str = "cpp") -> float:
    """The backend's speed over the baseline's, now."""
    with torch.no_grad():
        found = times(case, [backend] if baseline == "torch" else [backend, baseline], {}, rounds, least)
        return spread(ratios(found, backend, baseline))["median"]


def slower(measured: Iterable[Case], before: dict[str, tuple[str, float]], allowed: float = ALLOWED) -> list[str]:
    """A line for every case that stays under `allowed` of its recorded ratio in all attempts; cases without a record are passed over."""
    lines = []
    for case in measured:
        if case.name not in before:
            continue
        baseline, ratio = before[case.name]
        bound, best = allowed * ratio, 0.0
        for rounds, least in ATTEMPTS:
            best = max(best, speed(case, baseline, rounds, least))
            if best >= bound:
                break
        else:
            lines.append(f"{case.name}: {best:.2f} of torch's speed, recorded {ratio:.2f}, allowed {bound:.2f}")
    return lines


def other_machine(run: dict[str, Any]) -> str:
    """Why the record says nothing here: another processor or instruction set; "" where it does."""
    here = machine()
    return next((f"recorded on {run['machine'][k]}, this is {here[k]}" for k in ("isa", "cpu") if run["machine"][k] != here[k]), "")


def main() -> int:
    torch.set_num_threads(1)
    run = json.loads(RECORDED.read_text())
    if reason := other_machine(run):
        print(f"nothing to hold the kernels to: {reason}")
        return 0
    lines = slower(cases(quick=True), recorded(run))
    print("\n".join(lines) or "every kernel has at least 0.6 of its recorded ratio to torch")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
