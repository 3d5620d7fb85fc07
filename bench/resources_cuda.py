"""Compiles csrc/cuda/*.cu for three architectures and prints each kernel's registers, spills and static shared memory.

Exits with 1 where one spills. bench/resources.py writes the table.
"""

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


@cache
def version() -> str:
    """The compiler's release, such as 13.0.88, or an empty string."""
    compiler = nvcc()
    if compiler is None:
        return ""
    printed = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", printed)
    return found[1] if found else printed.strip()


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
    digest = hashlib.sha256(f"{compiler} {version()}".encode())
    for path in (source, *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def resources(architectures: tuple[str, ...] = ARCHITECTURES, jobs: int = 2) -> list[Kernel]:
    """Every kernel of every file on every architecture, ordered by file, name and architecture."""
    work = [(source, architecture) for source in sorted(SOURCES.glob("*.cu")) for architecture in architectures]
    with ThreadPoolExecutor(jobs) as pool:
        found = [kernel for kernels in pool.map(lambda pair: compile_one(*pair), work) for kernel in kernels]
    return sorted(found, key=lambda k: (k.source, k.name, architectures.index(k.architecture)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    try:
        kernels = resources(jobs=arguments.jobs)
    except RuntimeError as problem:
        print(problem, file=sys.stderr)
        return 1
    for k in kernels:
        print(f"{k.source} {k.name} {k.architecture}: {k.registers} registers, {k.static_shared_bytes} bytes of static shared memory")
    spilling = [f"{k.source} {k.name} {k.architecture}: {k.spill_bytes} bytes spilled" for k in kernels if k.spill_bytes]
    print("\n".join(spilling), file=sys.stderr, end="\n" if spilling else "")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
