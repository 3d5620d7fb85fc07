"""launch.cpp run on the CPU: every op from Python to its kernel and back, wide sides, widest widths, graph capture."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast import ops
from teleport_fast.ops.backend import set_backend

GPU = Path(__file__).resolve().parent.parent.parent / "bench" / "gpu"
CPU = torch.device("cpu")


@pytest.fixture
def cuda(launched: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with launched.chosen(monkeypatch) as chosen:
        yield chosen


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bench/gpu's check, by which a machine with a GPU judges the same ops."""
    monkeypatch.syspath_prepend(str(GPU))
    yield importlib.import_module("check")
    for name in ("problems", "check"):
        sys.modules.pop(name, None)


def test_every_op_passes_the_check_that_a_gpu_would_make(
    cuda: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SIZES", ((1, 1, 5), (3, 7, 65), (2, 33, 130)))
    rows, good = bench.check(["cuda"], CPU)
    assert good and not any("no kernel" in row for row in rows), rows


def test_a_wrong_kernel_fails_that_check(cuda: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SIZES", ((3, 7, 65),))
    right, real = cuda.ops.gram_difference.default, cuda.ops

    class Wrong:
        gram_difference = SimpleNamespace(default=lambda plus, minus, joints: right(minus, plus, joints))

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    monkeypatch.setattr(cuda, "ops", Wrong())
    assert not bench.check(["cuda"], CPU)[1]


def test_every_op_can_be_captured_in_a_graph(cuda: Any, bench: Any) -> None:
    from problems import problems

    for problem in problems(torch.float32, CPU, 2, 12, 40):
        free = problem.call(*bench.fresh(problem.inputs))
        with cuda.capturing():
            captured = problem.call(*bench.fresh(problem.inputs))
        assert all(map(torch.equal, free, captured)), problem.op


def test_large_tables_are_copied_and_under_capture_travel_with_launches(cuda: Any) -> None:
    tensors = [torch.randn(1, 3, 5) for _ in range(200)]
    moved = [t.clone() for t in tensors]
    s = torch.rand(1, 3) + 0.5
    ops.diagonal_action_(moved, s, [1.0] * 200)
    assert cuda.device.copies > 0
    cuda.reset()
    with cuda.capturing():
        ops.diagonal_action_(tensors, s, [1.0] * 200)
    assert cuda.device.copies == 0 and all(map(torch.equal, tensors, moved))


@pytest.mark.parametrize("base", ["adam", "sign", "row_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("h", "n"), [(130, 20), (20, 130), (130, 140)])
def test_wide_sides_of_a_turned_step_are_the_blass(cuda: Any, h: int, n: int, dtype: torch.dtype, base: str) -> None:
    acc = torch.promote_types(dtype, torch.float32)
    left, right = (torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0].to(acc) for shape in ((2, h, h), (n, n)))
    parameter, gradient = torch.randn(2, 2, h, n).to(dtype).unbind()
    # A gradient by columns: torch's product may answer in another layout than its operand's.
    gradient = gradient.mT.contiguous().mT
    moments = [torch.rand(2, h, n, dtype=acc) + 0.5 for _ in range(2)]

    def stepped(dtype: torch.dtype | None, backend: str) -> list[Tensor]:
        p, g, m, v, *sides = (t.to(dtype or t.dtype, copy=True) for t in (parameter, gradient, *moments, left, right))
        with set_backend(backend):
            ops.rotate_step_(p, g, m, v, *([side] for side in sides), base=base, step=3, lr=0.1, weight_decay=0.1)
        return [p, m, v]

    true, theirs, ours = stepped(torch.float64, "reference"), stepped(None, "reference"), stepped(None, "cuda")
    for exact, torchs, found in zip(true, theirs, ours, strict=True):
        unit = torch.finfo(found.dtype).eps * (16 if dtype == torch.float64 else 1)
        allowed = 2 * (torchs.double() - exact).abs().max() + unit * exact.abs().max()
        assert (found.double() - exact).abs().max() <= allowed


# What the kernels' headers say of a block with 163 KiB.
WIDEST = {
    "gram_difference": (248, 128),
    "covariance_": (248, 128),
    "grad_norm_objective": (140, 99),
    "matrix_exp": (64, 64),
    "matrix_exp_pair": (64, 64),
    "group_action_": (1024, 512),
    "square_sums": (-1, -1),
    "rotate_step_": (-1, -1),
}


def test_each_op_says_the_widest_it_takes_of_a_device(cuda: Any) -> None:
    assert cuda.device.shared_bytes == 163 << 10
    assert {op: (cuda.ops.widest(op, False), cuda.ops.widest(op, True)) for op in WIDEST} == WIDEST
    for op, (single, double) in WIDEST.items():
        for kib, sign in ((99, 1), (227, -1)):
            cuda.device.shared_bytes = kib << 10
            found = cuda.ops.widest(op, False), cuda.ops.widest(op, True)
            cuda.device.shared_bytes = 163 << 10
            assert sign * found[0] <= sign * single and sign * found[1] <= sign * double


@pytest.mark.parametrize("h", [64, 65])
def test_the_widest_is_computed_and_what_is_wider_refused(cuda: Any, h: int) -> None:
    M = torch.randn(1, h, h) / h
    if h <= cuda.ops.widest("matrix_exp", False):
        torch.testing.assert_close(cuda.ops.matrix_exp(M), torch.linalg.matrix_exp(M))
    else:
        with pytest.raises(RuntimeError, match="matrix_exp: the sizes are out of the CUDA kernel's range"):
            cuda.ops.matrix_exp(M)


def test_a_tensor_of_another_dtype_or_a_view_of_another_shape_is_no_memory_error(cuda: Any) -> None:
    with pytest.raises(RuntimeError, match="float64 throughout"):
        cuda.ops.gram_difference([torch.randn(1, 4, 8)], [torch.randn(1, 4, 8).double()], 1)
    with pytest.raises(RuntimeError, match="g has another shape"):
        cuda.ops.grad_norm_objective([torch.randn(1, 4, 8)], [], torch.randn(2, 1, 4, 3), 1)
