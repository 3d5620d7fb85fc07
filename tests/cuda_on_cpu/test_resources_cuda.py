"""Every kernel of csrc/cuda compiles for sm_80, sm_90a and sm_100 without a spill, as its table says; nvcc needs no GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
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
def resources() -> Iterator[ModuleType]:
    """bench/resources.py, which imports its neighbours."""
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module("resources")
    sys.path.remove(str(ROOT / "bench"))
    for name in ("resources", "resources_cuda", "resources_triton"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def resources_cuda(resources: ModuleType) -> ModuleType:
    return resources.resources_cuda


def test_spills_are_read_from_the_log(resources_cuda: ModuleType) -> None:
    (kernel,) = resources_cuda.parse("k.cu", "sm_80", LOG)
    assert (kernel.registers, kernel.stack_bytes, kernel.spill_bytes, kernel.static_shared_bytes) == (96, 8, 32, 128)
    with pytest.raises(ValueError, match="no resource line"):
        resources_cuda.parse("k.cu", "sm_80", LOG.replace("Used", "Took"))


def test_no_kernel_spills_and_the_table_says_what_each_takes(resources: ModuleType, resources_cuda: ModuleType) -> None:
    if resources_cuda.nvcc() is None:
        pytest.skip("needs nvcc (CUDA 12.8 or newer) on PATH")
    rows, failures = resources.cuda_rows(jobs=2)
    assert rows and not failures
    text = resources.TABLE.read_text(encoding="utf-8")
    table = [row for row in resources.recorded(text) if row.backend == "cuda"]
    if f"nvcc {resources_cuda.version()}," in text:
        assert table == rows, "run python bench/resources.py --parts cuda"
    else:
        assert [row.kernel for row in table] == [row.kernel for row in rows], (
            "run python bench/resources.py --parts cuda"
        )


def test_the_table_reads_back_as_it_was_written_and_knows_no_other_rows(resources: ModuleType) -> None:
    rows = [
        resources.Row("triton", "op fp32 h≤16", "4", ("96 / 0 / 1.0",) * 4),
        resources.Row("cuda", "k.cu `k<float, 4>`", "–", ("96 / 0 / 1.0",) * 3 + ("–",)),
    ]
    text = resources.written(rows, {"triton": "1.2.3", "cuda": "4.5.6"})
    assert resources.recorded(text) == rows and "triton 1.2.3, nvcc 4.5.6" in text
    assert resources.recorded(text.replace("| cuda |", "| metal |")) == rows[:1]
