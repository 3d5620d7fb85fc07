"""An op to which memory is refused raises MemoryError and has written nothing, whichever of its allocations it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import teleport_fast as tf

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "").split()[:1] or [name for name in ("c++", "g++") if shutil.which(name)][:1]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs Linux and a C++ compiler to refuse memory"),
    pytest.mark.skipif(tf.backends()["cpp"] is not True, reason="the C++ kernels are not built; make setup"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What allocating.py found, with two threads for the kernels."""
    library = tmp_path_factory.mktemp("failing") / "failing.so"
    build = [*COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", str(HERE / "failing.cpp"), "-o", str(library), "-ldl"]
    subprocess.run(build, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    run = subprocess.run([sys.executable, str(HERE / "allocating.py")], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_refused_allocation_is_a_memory_error_before_anything_is_written(found: Any) -> None:
    for name, (count, problems) in found.items():
        assert count >= 4, f"{name}: {count} allocations"
        if name != "control":
            assert not problems, f"{name}: {problems}"


def test_every_kernel_is_called(found: Any) -> None:
    names = {name.partition(",")[0] for name in found}
    source = (HERE.parents[1] / "csrc/ops.cpp").read_text(encoding="utf-8")
    ops = set(re.findall(r'm\.impl\("(\w+)"', source)) - {"isa"}
    assert len(ops) >= 15
    assert ops <= names


def test_the_check_notices_a_write_before_the_error(found: Any) -> None:
    count, problems = found["control"]
    assert len(problems) == count and all("wrote before it raised" in problem for problem in problems)
