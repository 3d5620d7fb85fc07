"""launch.cpp, the torch side of the CUDA kernels, compiles against torch's stable headers; it needs a GPU to run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "csrc" / "cuda"


def toolkit_include() -> Path | None:
    """The folder of nvcc's own headers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    for root in (Path(nvcc).resolve().parent.parent, Path("/usr/local/cuda")):
        if (root / "include" / "cuda_runtime_api.h").is_file():
            return root / "include"
    return None


def test_the_torch_side_compiles_without_a_warning() -> None:
    include, compiler = toolkit_include(), shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("needs nvcc's headers (a CUDA toolkit on PATH) and g++")
    definitions = ["USE_CUDA", "TELEPORT_FAST_CUDA_HOST", "TORCH_TARGET_VERSION=0x020b000000000000"]
    command = [compiler, "-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    command += [f"-D{name}" for name in definitions]
    command += ["-isystem", str(Path(torch.__file__).parent / "include"), "-isystem", str(include)]
    done = subprocess.run([*command, str(HERE / "launch.cpp")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_op_with_a_schema_is_registered_for_the_cpu_and_but_for_two_for_cuda() -> None:
    schemas, launch = (ROOT / "csrc" / "ops.cpp").read_text("utf-8"), (HERE / "launch.cpp").read_text("utf-8")
    about = {"isa", "widest"}
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', schemas)) - about
    registered = [set(re.findall(r'm\.impl\("(\w+)"', source)) - about for source in (schemas, launch)]
    assert registered[0] == defined
    # The papers' loop on one small batch is plain torch's on other devices, and so is a basis' refresh, by Cholesky-QR.
    assert registered[1] == defined - {"data_dependent_steps_", "orthogonal_iteration_"}


def test_every_kernel_file_is_reached_from_the_torch_side() -> None:
    sources = [(HERE / name).read_text(encoding="utf-8") for name in ("launch.cpp", "launch_steps.h", "host.h")]
    included = {name for source in sources for name in re.findall(r'#include "(\w+)\.h"', source)}
    assert {source.stem for source in HERE.glob("*.cu")} <= included
