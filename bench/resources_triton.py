"""Compiles every Triton kernel at every shipped configuration without a GPU; tables registers, spills, shared memory.

    python bench/resources_triton.py [--only TEXT] [--targets sm_80,gfx942] [--jobs 2]

Exits with 1 and one line per failure where a configuration does not compile, spills, or needs more shared memory than
its target has. Run it without TRITON_INTERPRET: interpreted functions cannot be compiled. bench/resources.py writes the table.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Shared memory that one program may have, in KiB.
TARGETS = {"sm_80": ("cuda", 80, 32, 163), "sm_90": ("cuda", 90, 32, 227), "sm_100": ("cuda", 100, 32, 227),
           "gfx942": ("hip", "gfx942", 64, 64)}  # fmt: skip


class Resources(NamedTuple):
    """What one kernel takes on one target; spills are bytes of local memory (stack, scratch) a thread."""

    registers: int
    spills: int
    shared: int


def shipped() -> list[Any]:
    """The configurations that the modules of teleport_fast.kernels name in their `shipped()`."""
    package = importlib.import_module("teleport_fast.kernels")
    found = []
    for module in pkgutil.iter_modules(package.__path__):
        names = getattr(importlib.import_module(f"teleport_fast.kernels.{module.name}"), "shipped", None)
        found += list(names()) if names else []
    return found


def build(configuration: Any, target: str) -> Resources:
    """Compiles one configuration for one target, down to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp, _ = TARGETS[target]
    names = configuration.kernel.arg_names
    types = {n: configuration.types.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): value for n, value in configuration.constants.items()}
    # Every pointer handed over is the start of an allocation or of a table; torch aligns those to 16 bytes and more.
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n].startswith("*")}
    source = ASTSource(configuration.kernel, types, constants, attributes)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    if backend == "hip":
        options["num_warps"] = max(1, configuration.num_warps // 2)  # a wavefront is 64 wide: as many threads as there
    compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    if backend == "hip":
        assembly = compiled.asm["amdgcn"]
        count, scratch = (int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])
                          for name in ("vgpr_count", "private_segment_fixed_size"))  # fmt: skip
        return Resources(count, scratch, compiled.metadata.shared)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run(
            [str(tool), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {dump[:200]!r}")
    spilled = _spilled(compiled.asm["ptx"], arch) if int(usage[2]) else 0
    return Resources(int(usage[1]), spilled, compiled.metadata.shared)


def _spilled(ptx: str, arch: int) -> int:
    """Bytes of spill stores and loads, as the assembler itself reports them: a stack alone may be a call's."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.search(r"\.target (\S+?)[,\s]", ptx)
        name = target[1] if target else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(source)]
        report = subprocess.run(
            [*command, "-o", str(Path(folder) / "kernel.cubin")], capture_output=True, text=True, check=True
        ).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))


def measure(label: str, target: str) -> Resources | str:
    """What the configuration of this label takes, or why it does not compile."""
    try:
        return build(next(c for c in shipped() if c.label == label), target)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def collect(
    only: str, targets: list[str], jobs: int
) -> tuple[list[tuple[str, int, dict[str, Resources | str]]], list[str]]:
    """(label, warps, what it takes by target) of every configuration asked for, and one line for each that fails."""
    patterns, known = only.split("|"), shipped()
    labels = {c.label for c in known}
    wanted = [c for c in known if any(p == c.label if p in labels else p in c.label for p in patterns)]
    rows, failures = [], []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, sys.path.insert, (0, str(ROOT))) as pool:
        results = pool.map(measure, [c.label for c in wanted for _ in targets], targets * len(wanted))
        for configuration in wanted:
            found = {target: next(results) for target in targets}
            for target, taken in found.items():
                where = f"{configuration.label} on {target}"
                if isinstance(taken, str):
                    failures.append(f"{where}: {taken}")
                elif taken.spills:
                    failures.append(f"{where}: {taken.spills} bytes spilled")
                elif taken.shared > TARGETS[target][3] * 1024:
                    failures.append(f"{where}: {taken.shared} bytes of shared memory")
            rows.append((configuration.label, configuration.num_warps, found))
            print(rows[-1][0], file=sys.stderr, flush=True)
    return rows, failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="a label, or text that labels contain; several are split by |")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated: " + ", ".join(TARGETS))
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (default: 2)")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    start, targets = time.perf_counter(), options.targets.split(",")
    rows, failures = collect(options.only, targets, options.jobs)
    print(f"| kernel, configuration | warps | {' | '.join(targets)} |")
    print("| --- | --- | " + " | ".join("---" for _ in targets) + " |")
    for label, warps, found in rows:
        cells = ["fails" if isinstance(f, str) else f"{f.registers} / {f.spills} / {f.shared / 1024:.1f}" for f in found.values()]
        print(f"| {label} | {warps} | {' | '.join(cells)} |")
    print(f"{len(rows)} configurations, {len(targets)} targets, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for failure in failures:
        print(f"resources_triton: {failure}", file=sys.stderr)
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
