"""Compiles csrc/cuda/*.cu for three architectures and tables each kernel's registers, spills and shared memory."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "resources_cuda"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture; dynamic shared memory is the launch's and not in it."""

    source: str
    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int


def nvcc() -> str | None:
    return shutil.which("nvcc")


def parse(source: str, architecture: str, log: str) -> list[Kernel]:
    """The kernels of one `nvcc -Xptxas -v` log. Errors: ValueError where ptxas wrote no resource line for one."""
    kernels = []
    for part in log.split("Compiling entry function '")[1:]:
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if frame is None or registers is None:
            raise ValueError(f"{source} {architecture}: ptxas wrote no resource line; its log was:\n{log}")
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = map(int, frame.groups())
        kernels.append(
            Kernel(
                source,
                demangle(part.split("'")[0]),
                architecture,
                int(registers.group(1)),
                stack,
                stores + loads,
                int(shared.group(1)) if shared else 0,
            )
        )
    return kernels


def demangle(symbol: str) -> str:
    """`gram_difference_kernel<float, 8, 16>` for its mangled name, without namespace and arguments."""
    tool = shutil.which("c++filt")
    if tool is None:
        return symbol
    name = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(int\)", "", name.replace("teleport_fast::", "")).removeprefix("void ")
    return re.sub(r"\([^()]*\)$", "", name)


def compile_one(source: Path, architecture: str) -> list[Kernel]:
    """Resources of the kernels in one file. Errors: RuntimeError with nvcc's output if it does not compile."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is missing; install a CUDA toolkit (12.8 or newer for sm_100) and put it on PATH")
    verbose = ["-Xptxas", "-v", "-cubin", "-o", "/dev/null"]
    command = [compiler, "-std=c++17", f"-arch={architecture}", *verbose, str(source)]
    cached = CACHE / f"{source.stem}-{architecture}-{fingerprint(source, compiler)}.log"
    if not cached.exists():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        CACHE.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(done.stderr, encoding="utf-8")
        part.replace(cached)
    return parse(source.name, architecture, cached.read_text(encoding="utf-8"))


@cache
def fingerprint(source: Path, compiler: str) -> str:
    """Of all that decides the log: the compiler's version, the file and every header beside it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(version.encode())
    for path in (source, *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def resources(architectures: tuple[str, ...] = ARCHITECTURES, jobs: int = 2) -> list[Kernel]:
    """Every kernel of every file on every architecture, ordered by file, name and architecture."""
    work = [(source, architecture) for source in sorted(SOURCES.glob("*.cu")) for architecture in architectures]
    with ThreadPoolExecutor(jobs) as pool:
        found = [kernel for kernels in pool.map(lambda pair: compile_one(*pair), work) for kernel in kernels]
    return sorted(found, key=lambda k: (k.source, k.name, architectures.index(k.architecture)))


def table(kernels: list[Kernel]) -> str:
    """The markdown table, one row per kernel, registers by architecture."""
    architectures = list(dict.fromkeys(kernel.architecture for kernel in kernels))
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.source, kernel.name), {})[kernel.architecture] = kernel
    lines = [
        "# Resources of the CUDA kernels",
        "",
        "Written by `python bench/resources_cuda.py`. Registers per thread, bytes of spills (stores and loads), static "
        "shared memory in bytes; dynamic shared memory depends on the sizes and is the planner's.",
        "",
        f"| file | kernel | {' | '.join(f'registers {a}' for a in architectures)} | spills | static shared |",
        f"| --- | --- | {' | '.join('---:' for _ in architectures)} | ---: | ---: |",
    ]
    for (source, name), on in rows.items():
        registers = " | ".join(str(on[a].registers) if a in on else "–" for a in architectures)
        spills, shared = sum(k.spill_bytes for k in on.values()), max(k.static_shared_bytes for k in on.values())
        lines.append(f"| {source} | `{name}` | {registers} | {spills} | {shared} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "resources_cuda.md")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    try:
        kernels = resources(jobs=arguments.jobs)
    except RuntimeError as problem:
        print(problem, file=sys.stderr)
        return 1
    arguments.out.write_text(table(kernels), encoding="utf-8")
    spilling = [f"{k.source} {k.name} {k.architecture}: {k.spill_bytes} bytes" for k in kernels if k.spill_bytes]
    print(f"{len(kernels)} kernels, {len(spilling)} of them spill; {arguments.out}")
    print("\n".join(spilling), end="\n" if spilling else "")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
