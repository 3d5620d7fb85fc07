"""Writes bench/resources.md: registers, spills and shared memory of every Triton and CUDA kernel, compiled without a GPU.

    python bench/resources.py [--parts triton cuda] [--jobs 2]

A part that is left out keeps the rows it has. Exits with 1 and one line per failure where a kernel does not compile, spills, or
needs more shared memory than its target has. Run it without TRITON_INTERPRET: interpreted functions cannot be compiled.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import resources_cuda
import resources_triton

TABLE = Path(__file__).with_name("resources.md")
PARTS = ("triton", "cuda")
# By the table's column: the CUDA kernels' architecture there.
CUDA = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100"}
COLUMNS = ("backend", "kernel", "warps", *resources_triton.TARGETS)


class Row(NamedTuple):
    """One line of the table, its cells as they are written."""

    backend: str
    kernel: str
    warps: str
    cells: tuple[str, ...]


def cell(registers: int, spills: int, shared: int) -> str:
    return f"{registers} / {spills} / {shared / 1024:.1f}"


def triton_rows(jobs: int) -> tuple[list[Row], list[str]]:
    found, failures = resources_triton.collect("", list(resources_triton.TARGETS), jobs)
    rows = []
    for label, warps, taken in found:
        cells = tuple("fails" if isinstance(t, str) else cell(t.registers, t.spills, t.shared) for t in taken.values())
        rows.append(Row("triton", label, str(warps), cells))
    return rows, failures


def cuda_rows(jobs: int) -> tuple[list[Row], list[str]]:
    kernels = resources_cuda.resources(jobs=jobs)
    by_name: dict[tuple[str, str], dict[str, str]] = {}
    for k in kernels:
        by_name.setdefault((k.source, k.name), {})[k.architecture] = cell(
            k.registers, k.spill_bytes, k.static_shared_bytes
        )
    rows = [
        Row("cuda", f"{source} `{name}`", "–", tuple(on.get(CUDA.get(t, ""), "–") for t in resources_triton.TARGETS))
        for (source, name), on in by_name.items()
    ]
    return rows, [
        f"{k.source} {k.name} {k.architecture}: {k.spill_bytes} bytes spilled" for k in kernels if k.spill_bytes
    ]


def recorded(text: str) -> list[Row]:
    """The rows of a table that was written before."""
    rows = []
    for line in text.splitlines():
        cells = [part.strip() for part in line.strip("|").split(" | ")]
        if len(cells) == len(COLUMNS) and cells[0] in PARTS:
            rows.append(Row(cells[0], cells[1], cells[2], tuple(cells[3:])))
    return rows


def written(rows: list[Row], compilers: dict[str, str]) -> str:
    lines = [
        "# What the GPU kernels take",
        "",
        f"`python bench/resources.py`, triton {compilers['triton']}, nvcc {compilers['cuda']}, no GPU: registers per thread / bytes "
        "spilled per thread / KiB of shared memory per block. CUDA: shared memory is what is static, the rest is the planners' by "
        "size, as are the warps; sm_90 is sm_90a there. Speed: unmeasured.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| " + " | ".join("---" for _ in COLUMNS) + " |",
    ]
    lines += [f"| {' | '.join((r.backend, r.kernel, r.warps, *r.cells))} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (default: 2)")
    options = parser.parse_args()
    if resources_triton.interpreted():
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    import triton

    old, rows, failures = recorded(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else [], [], []
    for part, collect in (("triton", triton_rows), ("cuda", cuda_rows)):
        if part not in options.parts:
            rows += [row for row in old if row.backend == part]
            continue
        try:
            found, failed = collect(options.jobs)
        except RuntimeError as problem:
            print(f"resources: {problem}", file=sys.stderr)
            return 1
        rows += found
        failures += failed
    TABLE.write_text(written(rows, {"triton": triton.__version__, "cuda": resources_cuda.version()}), encoding="utf-8")
    print(f"{len(rows)} rows, {len(failures)} failures; {TABLE}")
    for failure in failures:
        print(f"resources: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path.insert(0, str(resources_triton.ROOT))
    sys.exit(main())
