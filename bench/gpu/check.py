"""Errors of every op and backend on the device against the reference in float64 on the CPU, beside plain torch's own error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from problems import Outputs, Problem, problems
from torch import Tensor

from teleport_fast.ops.backend import set_backend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (heads, h, n), odd ones among them.
SIZES = ((1, 1, 5), (3, 7, 65), (2, 32, 127), (4, 64, 256), (2, 128, 300))
ALLOWED = 2.0
# Granted where torch happens to be exact: roundings of the result; in float64, where the truth is rounded too, more of them.
ROUNDINGS = {torch.float64: 16.0}


def fresh(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Copies with the strides of the originals: in-place ops change them."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in inputs]


def exact(problem: Problem) -> Outputs:
    doubled = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in problem.inputs]
    with set_backend("reference"):
        return problem.call(*fresh(doubled))


def error(outputs: Outputs, truth: Outputs) -> float:
    """Largest deviation over the outputs, relative to the truth's largest entry; NaN counts as infinite."""
    errors = [
        float((o.double().cpu() - t).abs().max() / t.abs().max().clamp(min=1e-30)) for o, t in zip(outputs, truth, strict=True)
    ]
    return max(float("inf") if e != e else e for e in errors)


def check(backends: Sequence[str], device: torch.device) -> tuple[list[str], bool]:
    """A markdown table, and whether every error is at most twice torch's own (or a few roundings)."""
    rows = ["| op | dtype | backend | worst error over torch's | at |", "| --- | --- | --- | --- | --- |"]
    good = True
    worst: dict[tuple[str, str, str], tuple[float, str]] = {}
    for dtype in DTYPES:
        for size in SIZES:
            for problem in problems(dtype, device, *size):
                truth = exact(problem)
                with set_backend("reference"):
                    floor = max(
                        error(problem.call(*fresh(problem.inputs)), truth), ROUNDINGS.get(dtype, 1.0) * torch.finfo(dtype).eps
                    )
                for backend in backends:
                    key = (problem.op, str(dtype).removeprefix("torch."), backend)
                    try:
                        with set_backend(backend):
                            ratio = error(problem.call(*fresh(problem.inputs)), truth) / floor
                        at = problem.label
                    except RuntimeError as reason:
                        ratio, at = (0.0, "no kernel") if "cannot compute" in str(reason) else (float("inf"), str(reason)[:80])
                    if key not in worst or ratio > worst[key][0]:
                        worst[key] = (ratio, at)
    for (op, dtype_name, backend), (ratio, at) in sorted(worst.items()):
        good = good and ratio <= ALLOWED
        verdict = f"{ratio:.2f}" if ratio <= ALLOWED else f"**{ratio:.2f}**"
        rows.append(f"| {op} | {dtype_name} | {backend} | {verdict if at != 'no kernel' else '–'} | {at} |")
    return rows, good
