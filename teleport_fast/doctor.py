"""Says which parts of an installation are there, why the others are not, and which command brings them."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation --no-deps -e ."
OPTIONAL = {"triton": "triton", "typer": "cli", "rich": "cli", "matplotlib": "plot"}
COMPILERS = ("c++", "g++", "clang++")


def diagnose() -> dict[str, Any]:
    """What this installation holds: a dictionary of plain values that `json.dumps` takes.

    Keys: `ok` (the package can be used), `version`, `python`, `torch`, `packages`, `tools`, `extension`, `backends`,
    `threads`. Whatever may be missing is a dictionary with `available`, and where that is false with `reason` and
    `remedy`. Raises nothing for a missing part: that is what it reports.

    >>> report = diagnose()
    >>> report["backends"]["reference"]["available"]
    True
    """
    from teleport_fast.ops.backend import backends as states

    tools, states_now = _tools(), states()
    extension = _extension(states_now["cpp"], tools)
    backends = {
        name: {"available": True} if state is True else _missing(str(state), _remedy(name, tools, extension))
        for name, state in states_now.items()
    }
    return {
        "ok": backends["reference"]["available"],
        "version": _version("teleport-fast") or "not installed (running from a checkout)",
        "python": {"version": platform.python_version(), "executable": sys.executable, "machine": platform.machine()},
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
        "packages": {name: _package(name, extra) for name, extra in OPTIONAL.items()},
        "tools": tools,
        "extension": extension,
        "backends": backends,
        "threads": {
            "torch": torch.get_num_threads(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
    }


def render(report: dict[str, Any]) -> str:
    """The report of `diagnose` as text: one line a part, and under each missing part why and what to do.

    >>> print(render(diagnose()).splitlines()[0].split()[0])
    teleport_fast
    """
    torch_part = report["torch"]
    where = torch_part["device"] or "no GPU"
    cuda = f"CUDA {torch_part['cuda']}" if torch_part["cuda"] else "built without CUDA"
    threads = report["threads"]
    lines = [
        f"teleport_fast  {report['version']}",
        f"python         {report['python']['version']}  {report['python']['executable']}",
        f"torch          {torch_part['version']}  {cuda}, {where}",
        f"threads        {threads['torch']} of {threads['cpus']} CPUs, OMP_NUM_THREADS={threads['OMP_NUM_THREADS']}",
    ]
    for title in ("backends", "extension", "packages", "tools"):
        lines += ["", title]
        parts = {"native": report[title]} if title == "extension" else report[title]
        for name, part in parts.items():
            lines += _part_lines(name, part)
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> str:
    """The backends on one line, and one more line for each part that is missing because the build lacked something.

    >>> summary(diagnose()).startswith("backends: reference")
    True
    """
    available = [name for name, part in report["backends"].items() if part["available"]]
    lines = ["backends: " + ", ".join(available)]
    extension = report["extension"]
    if not extension["available"]:
        lines.append(f"pure Python: {extension['reason']}\n  -> {extension['remedy']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m teleport_fast.doctor`: prints the report without any optional package; 1 where a required part lacks.

    >>> main(["--require", "reference", "--summary"]) # doctest: +ELLIPSIS
    backends: reference...
    0
    """
    parser = argparse.ArgumentParser(prog="python -m teleport_fast.doctor", description=__doc__)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the report as JSON")
    shape.add_argument("--summary", action="store_true", help="print the backends on one line")
    parser.add_argument("--require", action="append", default=[], metavar="BACKEND", help="fail where it is missing")
    options = parser.parse_args(arguments)
    report = diagnose()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(summary(report) if options.summary else render(report))
    unknown = _missing("no such backend", "choose from " + ", ".join(report["backends"]))
    required = {name: report["backends"].get(name, unknown) for name in options.require}
    missing = {name: part for name, part in required.items() if not part["available"]}
    for name, part in missing.items():
        print(f"required backend {name} is missing: {part['reason']}; {part['remedy']}", file=sys.stderr)
    return 1 if missing or not report["ok"] else 0


def _part_lines(name: str, part: dict[str, Any]) -> list[str]:
    if part["available"]:
        detail = part.get("version") or ", ".join(f"{key} {value}" for key, value in part.get("build", {}).items())
        return [f"  {name:<12} yes  {detail}".rstrip()]
    return [f"  {name:<12} no   {part['reason']}", f"  {'':<12}      -> {part['remedy']}"]


def _missing(reason: str, remedy: str) -> dict[str, Any]:
    return {"available": False, "reason": reason, "remedy": remedy}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, extra: str) -> dict[str, Any]:
    version = _version(name)
    if version is None:
        return _missing(f"{name} is not installed", f"pip install 'teleport-fast[{extra}]' (or: pip install {name})")
    return {"available": True, "version": version}


def _tools() -> dict[str, Any]:
    chosen = os.environ.get("CXX", "").split()
    compilers = chosen[:1] or COMPILERS
    found = next((name for name in compilers if shutil.which(name)), None)
    return {
        "c++": _tool(found, "install a C++17 compiler (Debian, Ubuntu: apt-get install g++), or set CXX", compilers),
        "cmake": _tool("cmake", "pip install cmake"),
        "ninja": _tool("ninja", "pip install ninja"),
        "Python.h": _python_header(),
        "nvcc": _tool("nvcc", "install the CUDA toolkit; needed for the cuda backend only"),
    }


def _python_header() -> dict[str, Any]:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        return {"available": True, "version": platform.python_version(), "path": str(header)}
    remedy = "install Python's headers (Debian, Ubuntu: apt-get install python3-dev)"
    return _missing(f"{header} does not exist", remedy)


def _tool(name: str | None, remedy: str, tried: Sequence[str] = ()) -> dict[str, Any]:
    # The environment's own bin comes first: that is where the build looks, activated or not.
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    path = name and shutil.which(name, path=places)
    if not path:
        return _missing(f"{' or '.join(tried) or name} not found on PATH", remedy)
    try:
        printed = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return _missing(f"{path} --version failed: {error}", remedy)
    lines = [line for line in printed.splitlines() if line.strip()]
    # nvcc names its release on the last line, the others on the first.
    return {"available": True, "version": lines[-1 if name == "nvcc" else 0] if lines else "unknown", "path": path}


def _extension(cpp: bool | str, tools: dict[str, Any]) -> dict[str, Any]:
    if cpp is True:
        try:
            build = dict(importlib.import_module("teleport_fast._C").build_info())
        except ImportError:
            build = {"isa": "unknown (teleport_fast._C was built for another Python)"}
        return {"available": True, "build": build}
    lacking = [name for name in ("c++", "cmake", "Python.h") if not tools[name]["available"]]
    if lacking:
        reason = f"no native library: {', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing"
        return _missing(reason, "; ".join([tools[name]["remedy"] for name in lacking] + [f"then {REBUILD}"]))
    return _missing(str(cpp), f"TELEPORT_FAST_REQUIRE_EXT=1 {REBUILD} builds it, or shows what stops the build")


def _remedy(name: str, tools: dict[str, Any], extension: dict[str, Any]) -> str:
    if name == "triton":
        if _version("triton") is None:
            return "pip install 'teleport-fast[triton]' (or: pip install triton)"
        return "needs a GPU; TRITON_INTERPRET=1, set before the first import, runs its kernels on the CPU for tests"
    if name == "cuda":
        if torch.version.cuda is None:
            return f"install a CUDA build of torch, then {REBUILD}"
        if not torch.cuda.is_available():
            return "needs an NVIDIA GPU and its driver"
        return f"{'' if tools['nvcc']['available'] else tools['nvcc']['remedy'] + ', then '}{REBUILD}"
    return str(extension["remedy"])


if __name__ == "__main__":
    sys.exit(main())
