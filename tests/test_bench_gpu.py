"""bench/gpu: its check accepts right kernels and catches a wrong one; without a GPU the command says so and measures nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from teleport_fast.ops.backend import Op, availability

FOLDER = Path(__file__).resolve().parent.parent / "bench" / "gpu"
MODULES = ("problems", "check", "micro")
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import importlib

    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


needs_cpp = pytest.mark.skipif(availability("cpp") is not True, reason="the extension is not built")


@needs_cpp
def test_right_kernels_pass_its_check(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    check = bench("check")
    monkeypatch.setattr(check, "SIZES", ((3, 7, 65), (2, 32, 40)))
    rows, good = check.check(["cpp"], CPU)
    assert good, rows
    assert {row.split(" | ")[0].strip("| ") for row in rows[2:]} >= {"gram_difference", "rotate_step_", "teleport_adamw_"}


@needs_cpp
def test_a_wrong_kernel_fails_its_check(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    check = bench("check")
    monkeypatch.setattr(check, "SIZES", ((3, 7, 65),))
    right = Op._kernel

    def wrong(self: Op, backend: str) -> Any:
        kernel = right(self, backend)
        if self.name != "gram_difference" or backend != "cpp":
            return kernel
        return lambda plus, minus, joints: kernel(minus, plus, joints)

    monkeypatch.setattr(Op, "_kernel", wrong)
    from teleport_fast.ops.gram_difference import _OP

    _OP._choose.cache_clear()
    try:
        _, good = check.check(["cpp"], CPU)
    finally:
        _OP._choose.cache_clear()
    assert not good


@needs_cpp
def test_every_op_gets_a_time_beside_torch_a_copy_and_the_blas(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    micro = bench("micro")
    monkeypatch.setattr(micro, "QUICK", ((2, 4, 8),))

    def wall(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    rows = micro.measure(["cpp"], CPU, 3, True, wall)[4:]
    routes = {row.split(" | ")[3] for row in rows}
    assert routes == {"torch", "cpp", "copy of as many bytes", "one float32 product of its shape"}
    assert not any("no kernel" in row for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    run = subprocess.run([sys.executable, str(FOLDER), "--out", str(out)], capture_output=True, text=True)
    assert run.returncode == 2 and "torch sees no GPU" in run.stderr
    assert not out.exists()


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_passes_its_check(bench: Callable[[str], ModuleType]) -> None:
    usable = [name for name in ("triton", "cuda") if availability(name) is True]
    rows, good = bench("check").check(usable, torch.device("cuda"))
    assert usable and good, rows
