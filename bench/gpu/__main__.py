"""Everything that only a GPU can show, in one command: correctness, memory checks, speed side by side; writes one table.

python bench/gpu [--out bench/gpu.md] [--rounds 50] [--quick] [--backends triton cuda]

A step that cannot run here is written down with its reason, never left out. The exit status is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from check import check
from micro import measure

from teleport_fast.ops.backend import availability

ROOT = Path(__file__).resolve().parent.parent.parent
COUNTERS = "dram__bytes_read.sum,dram__bytes_write.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed"


def machine() -> str:
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {properties.major}.{properties.minor}, "
        f"CUDA {torch.version.cuda}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def outside(title: str, tool: str, command: list[str]) -> tuple[list[str], bool]:
    """A section with the last lines of another tool's output; a missing tool is said, not failed."""
    path = shutil.which(tool)
    if path is None:
        return [f"## {title}", "", f"unmeasured: {tool} is not on PATH.", ""], True
    run = subprocess.run([path, *command], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    lines = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()][-12:]
    if tool == "ncu" and "ERR_NVGPUCTRPERM" in run.stdout + run.stderr:
        return [f"## {title}", "", "unmeasured: this machine does not let users read the counters.", ""], True
    return [f"## {title}", "", f"`{tool} {' '.join(command)}`", "", "```", *lines, "```", ""], run.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "gpu.md")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="no compute-sanitizer, no ncu, small sizes")
    parser.add_argument("--backends", nargs="*", default=["triton", "cuda"])
    parser.add_argument("--only-check", action="store_true", help="correctness alone, for the tools that wrap this command")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu: torch sees no GPU; run this on a machine that has one and a torch built for it", file=sys.stderr)
        return 2
    usable = [name for name in options.backends if availability(name) is True]
    absent = [f"- {name}: unmeasured, {availability(name)}" for name in options.backends if name not in usable]

    rows, good = check(usable, torch.device("cuda"))
    if options.only_check:
        print("\n".join(rows))
        return 0 if good else 1
    command = " ".join(["python bench/gpu", *sys.argv[1:]])
    text = ["# On a GPU", "", f"`{command}`", "", machine(), "", *absent, ""]
    text += ["## Errors against float64, as multiples of plain torch's own", "", *rows, ""]
    text += ["## Time", "", *measure(usable, torch.device("cuda"), options.rounds, options.quick), ""]
    if not options.quick:
        again = [sys.executable, "bench/gpu", "--only-check", "--backends", *usable]
        for title, tool, command in (
            ("compute-sanitizer memcheck", "compute-sanitizer", ["--error-exitcode", "1", *again]),
            ("compute-sanitizer racecheck", "compute-sanitizer", ["--tool", "racecheck", "--error-exitcode", "1", *again]),
            # Kernels by their own names, so that ncu leaves torch's alone.
            ("Counters", "ncu", ["--metrics", COUNTERS, "--kernel-name", "regex:tf_|_kernel", "--launch-count", "40", *again]),
        ):
            section, fine = outside(title, tool, command)
            text += section
            good = good and fine
    options.out.write_text("\n".join(text) + "\n")
    print(f"{options.out}: {'all checks hold' if good else 'a check failed, see the table'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
