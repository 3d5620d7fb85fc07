"""CUDA graphs hold every op: nothing is read back, nothing waits; on a machine with a GPU, and what can be seen without one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from teleport_fast.ops.backend import availability, set_backend
from teleport_fast.ops.inverse import inverse, inverse_or_nan

GPU = Path(__file__).resolve().parents[2] / "bench" / "gpu"


def test_an_inverse_that_is_not_waited_for_is_torchs_or_nan():
    matrices = torch.randn(3, 5, 5, dtype=torch.float64)
    assert torch.equal(inverse_or_nan(matrices), torch.linalg.inv(matrices))
    matrices[1, :, 2] = 0
    found = inverse_or_nan(matrices)
    assert found[1].isnan().all() and torch.equal(found[::2], torch.linalg.inv(matrices[::2]))
    with pytest.raises(RuntimeError, match="singular"):
        inverse(matrices)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_every_op_is_captured_and_replayed(backend, monkeypatch):
    if availability(backend) is not True:
        pytest.skip(f"{backend}: {availability(backend)}")
    monkeypatch.syspath_prepend(str(GPU))
    problems, fresh = importlib.import_module("problems").problems, importlib.import_module("check").fresh
    try:
        with set_backend(backend):
            for problem in problems(torch.float32, torch.device("cuda"), 2, 12, 40):
                # torch's own reads the norms back.
                if (problem.op, backend) == ("matrix_exp", "reference"):
                    continue
                for _ in range(2):
                    true = problem.call(*fresh(problem.inputs))
                inputs, graph = fresh(problem.inputs), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    found = problem.call(*inputs)
                for tensor, start in zip(inputs, problem.inputs, strict=True):
                    tensor.copy_(start)
                graph.replay()
                torch.cuda.synchronize()
                assert all(map(torch.equal, found, true)), problem.op
    finally:
        for name in ("problems", "check"):
            sys.modules.pop(name, None)
