"""Every kernel of csrc/cuda compiles for sm_80, sm_90a and sm_100 without a spill; nvcc needs no GPU for that."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LOG = """
ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 128 bytes smem, 464 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def resources_cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resources_cuda", ROOT / "bench" / "resources_cuda.py")
    assert spec is not None and spec.loader is not None
    sys.modules["resources_cuda"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_spills_are_read_from_the_log(resources_cuda: ModuleType) -> None:
    (kernel,) = resources_cuda.parse("k.cu", "sm_80", LOG)
    assert (kernel.registers, kernel.stack_bytes, kernel.spill_bytes, kernel.static_shared_bytes) == (96, 8, 32, 128)
    assert "| k.cu |" in resources_cuda.table([kernel])
    with pytest.raises(ValueError, match="no resource line"):
        resources_cuda.parse("k.cu", "sm_80", LOG.replace("Used", "Took"))


def test_no_kernel_spills(resources_cuda: ModuleType) -> None:
    if resources_cuda.nvcc() is None:
        pytest.skip("needs nvcc (CUDA 12.8 or newer) on PATH")
    kernels = resources_cuda.resources()
    assert {k.architecture for k in kernels} == set(resources_cuda.ARCHITECTURES)
    assert [k for k in kernels if k.spill_bytes or k.registers == 0] == []
    recorded = (ROOT / "bench" / "resources_cuda.md").read_text(encoding="utf-8")
    missing = [k.name for k in kernels if f"`{k.name}`" not in recorded]
    assert not missing, "run python bench/resources_cuda.py"
