"""docs/op.md's C++ kernel compiles as it is printed; that it computes what it should was tried by hand when it was written."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_the_kernel_of_the_page_compiles_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++17 compiler: apt-get install g++")
    kernel, placed = re.findall(r"```cpp\n(.*?)```", (ROOT / "docs/op.md").read_text(), re.S)
    declaration = placed.partition(";")[0]
    assert declaration.removeprefix("torch::stable::Tensor ").replace("torch::stable::", "") in kernel
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-fsyntax-only", "-isystem", str(include)]
    for text, compiles in ((kernel, True), (kernel.replace("view.row_step", "view.no_such_step"), False)):
        (tmp_path / "head_norms.cpp").write_text(text)
        done = subprocess.run(
            [compiler, *flags, "-iquote", str(ROOT / "csrc/cpu"), str(tmp_path / "head_norms.cpp")], capture_output=True, text=True
        )
        assert (done.returncode == 0) == compiles, done.stderr
