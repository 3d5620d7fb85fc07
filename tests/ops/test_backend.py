"""The choice of a backend: asked for, usable, preferred are three questions, and each wrong answer says what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import teleport_fast
from teleport_fast.experiments import timing
from teleport_fast.ops import backend as module
from teleport_fast.ops import gram_difference, group_action
from teleport_fast.ops.backend import (
    BACKENDS,
    Op,
    availability,
    backends,
    current_backend,
    direct,
    layout_of,
    set_backend,
)

FLOAT = frozenset([torch.float32])


@pytest.fixture(autouse=True)
def auto_again():
    yield
    set_backend("auto")


def test_reference_is_always_there_and_all_others_say_why_not():
    found = backends()
    assert tuple(found) == BACKENDS and found["reference"] is True
    assert all(state is True or (isinstance(state, str) and state) for state in found.values())


def test_a_call_holds_for_the_process_and_a_block_for_its_thread():
    seen: dict[str, str] = {}

    def look(name: str) -> None:
        seen[name] = current_backend()

    set_backend("reference")
    with set_backend("auto"):
        look("block")
        thread = threading.Thread(target=look, args=("thread",))
        thread.start()
        thread.join()
    look("after")
    assert seen == {"block": "auto", "thread": "reference", "after": "reference"}


def test_blocks_nest_and_end_with_an_error():
    with set_backend("reference"):
        with pytest.raises(ZeroDivisionError), set_backend("auto"):
            raise ZeroDivisionError
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_unknown_and_missing_backends_are_refused():
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference.* got 'blas'"):
        set_backend("blas")
    for name, state in backends().items():
        if state is not True:
            with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: "):
                set_backend(name)
    assert current_backend() == "auto"


def plain(*arguments: object) -> str:
    return "reference"


def test_a_backend_that_was_asked_for_and_cannot_is_an_error_and_under_auto_it_is_passed_over():
    op = Op("an_op_without_kernels", plain)
    tensors = [torch.ones(1, 2, 3)]
    assert op.choose(tensors, size=2) is plain
    if availability("cpp") is True:
        with set_backend("cpp"), pytest.raises(RuntimeError, match="an_op_without_kernels: it has no kernel"):
            op.choose(tensors, size=2)


def test_a_library_that_does_not_load_says_why_in_the_loaders_words(tmp_path: Path):
    library = tmp_path / "_ops_cuda.so"
    library.write_bytes(b"no library")
    reason = module._load(library)
    assert isinstance(reason, str) and reason.startswith("_ops_cuda.so does not load: ")
    assert "Could not load this library" not in reason and "file too short" in reason and "pip install" in reason


def test_cuda_says_what_it_waits_for(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    monkeypatch.setattr(module, "availability", lambda name: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert module._cuda() == "torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module._cuda() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module._cuda().startswith("_ops_cuda.so is not built; ")
    (tmp_path / "_ops_cuda.so").write_text("no library")
    assert module._cuda().startswith("_ops_cuda.so does not load: ")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert module._cuda() is True  # the instruction set is asked of _ops.so alone
    monkeypatch.setattr(module, "availability", lambda name: "_ops.so is not built")
    assert module._cuda() == "_ops.so is not built"


def test_triton_says_what_it_waits_for(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert module._triton() == "triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert module._triton() == "torch sees no GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert module._triton() is True
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    assert module._triton() == "this version has no Triton kernels"


def test_a_backend_that_is_missing_cannot_be_used_and_says_why(monkeypatch):
    monkeypatch.setattr(module, "availability", lambda name: f"{name} is away")
    op = Op("gram_difference", plain)
    assert op.can_use("reference", "cpu", FLOAT) is True and op.can_use("cuda", "cuda", FLOAT) == "cuda is away"
    with pytest.raises(
        RuntimeError, match="backend 'triton' cannot compute gram_difference: triton is away; use set_backend"
    ):
        op._choose_uncached("triton", "cpu", FLOAT, 2)


@pytest.mark.skipif(availability("triton") is not True, reason=str(availability("triton")))
def test_a_triton_kernel_is_found_by_the_ops_name():
    assert Op("gram_difference", plain)._kernel("triton").__module__ == "teleport_fast.kernels.gram_difference"
    assert Op("an_op_without_kernels", plain)._kernel("triton") is None


def test_cpp_does_not_take_tensors_of_another_device():
    if availability("cpp") is not True:
        pytest.skip(str(availability("cpp")))
    op = Op("gram_difference", plain)
    assert op.can_use("cpp", "cpu", FLOAT) is True
    assert op.can_use("cpp", "cuda", FLOAT) == "it computes on cpu, the tensors are on cuda"


def test_a_width_that_the_cuda_kernel_does_not_hold_is_torchs(monkeypatch):
    op = Op("gram_difference", plain)
    monkeypatch.setattr(module, "availability", lambda name: True)
    monkeypatch.setattr(module, "_widest", lambda name, float64: 128 if float64 else 256)
    monkeypatch.setattr(op, "_kernel", lambda name: f"{name}'s")
    monkeypatch.setattr(op, "prefer", lambda device, dtypes, size, layout: ["cuda", "reference"])
    double = frozenset([torch.float64])
    assert op.can_use("cuda", "cuda", FLOAT, 256) is True and op.can_use("cuda", "cuda", double, 128) is True
    reason = op.can_use("cuda", "cuda", double, 129)
    assert reason == "its kernel holds widths up to 128 in this device's shared memory, got 129; plain torch takes any"
    assert op._choose_uncached("auto", "cuda", FLOAT, 256) == "cuda's"
    assert op._choose_uncached("auto", "cuda", FLOAT, 257) == "reference's"
    with pytest.raises(RuntimeError, match="'cuda' cannot compute gram_difference: its kernel holds widths up to 256"):
        op._choose_uncached("cuda", "cuda", FLOAT, 257)


def test_preferences_are_read_by_instruction_set_dtype_layout_and_size(monkeypatch):
    rows = [{"up_to": 8, "backends": ["cpp"]}, {"up_to": None, "backends": []}]
    always = [{"up_to": None, "backends": ["triton"]}]
    table = {
        "avx2": {"any": rows, "float64": always, "float32/rows": always},
        "avx512": {"any": always},
        "cuda": {"any": rows},
    }
    monkeypatch.setattr(module, "_PREFERENCES", {"ops": {"some_op": table, "on_any_cpu": {"cpu": {"any": rows}}}})
    monkeypatch.setattr(module, "_isa", lambda: "avx2")
    op, double = Op("some_op", plain), frozenset([torch.float64])
    assert op.prefer("cpu", FLOAT, 8) == ["cpp", "reference"] and op.prefer("cpu", FLOAT, 9) == ["reference"]
    assert op.prefer("cpu", double, 9) == ["triton", "reference"] and op.prefer("cpu", FLOAT | double, 9) == [
        "reference"
    ]
    assert op.prefer("cpu", FLOAT, 9, "rows") == ["triton", "reference"] and op.prefer("cpu", FLOAT, 9, "columns") == [
        "reference"
    ]
    assert op.prefer("cuda", FLOAT, 1) == ["cpp", "reference"] and op.prefer("mps", FLOAT, 1) == ["reference"]
    assert Op("on_any_cpu", plain).prefer("cpu", FLOAT, 8) == ["cpp", "reference"]
    monkeypatch.setattr(module, "_isa", lambda: "avx512")
    assert op.prefer("cpu", FLOAT, 9) == ["triton", "reference"]
    # Where nothing was measured, nothing is preferred.
    monkeypatch.setattr(module, "_isa", lambda: "default")
    assert op.prefer("cpu", FLOAT, 8) == ["reference"]


def test_the_layout_is_looked_at_where_the_table_speaks_of_it(monkeypatch):
    slow = {"any": [{"up_to": None, "backends": []}], "float32/columns": [{"up_to": None, "backends": ["cpp"]}]}
    monkeypatch.setattr(module, "_PREFERENCES", {"ops": {"some_op": {"avx2": slow}}})
    monkeypatch.setattr(module, "_isa", lambda: "avx2")
    op = Op("some_op", plain)
    monkeypatch.setattr(op, "can_use", lambda *arguments: True)
    monkeypatch.setattr(op, "_kernel", lambda name: name)
    rows, columns = torch.ones(2, 3, 4), torch.ones(4, 2, 3).permute(1, 2, 0)
    assert [layout_of(t) for t in ([rows], [columns], [rows, columns])] == ["rows", "columns", ""]
    assert [op.choose(t, size=3) for t in ([rows], [columns], [rows, columns])] == ["reference", "cpp", "reference"]


def test_the_table_names_backends_that_exist_and_the_command_that_measured_it():
    table = json.loads((Path(module.__file__).parent / "preferences.json").read_text())
    for machines in table["ops"].values():
        for machine, tables in machines.items():
            assert machine in ("cpu", "default", "avx2", "avx512", "cuda")
            measured = tables.pop("measured")
            assert "bench" in measured["command"] and measured["machine"]
            for key, rows in tables.items():
                dtype, _, layout = key.partition("/")
                assert (hasattr(torch, dtype) or dtype == "any") and layout in ("", "rows", "columns")
                assert rows[-1]["up_to"] is None and all(set(row["backends"]) <= set(BACKENDS) for row in rows)
                limits = [row["up_to"] for row in rows[:-1]]
                assert limits == sorted(limits)


def test_the_check_finds_a_backend_that_is_slower_than_plain_torch(monkeypatch):
    """bench/ops/prefer.py --check, on an op whose fast case is fast and whose slow one is not, by a clock that counts."""
    spec = importlib.util.spec_from_file_location("prefer", Path(__file__).parents[2] / "bench/ops/prefer.py")
    prefer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prefer)
    now = [0.0]

    def call(seconds: float) -> None:
        now[0] += seconds if current_backend() == "auto" else 1.0

    def cases(size: int, dtype: torch.dtype):
        yield "fast", lambda: call(0.5)
        yield "as fast", lambda: call(1.02)
        yield "slow", lambda: call(1.05 if dtype == torch.float64 else 1.0)

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    bench = types.SimpleNamespace(OP="an_op", SIZES=(4,), cases=cases)
    assert prefer.losses(iter([bench]), rounds=3) == ["an_op float64 slow: 0.95 of plain torch's speed"]
    assert prefer.rows_of([(4, ["cpp"]), (8, ["cpp"]), (16, [])]) == [
        {"up_to": 8, "backends": ["cpp"]},
        {"up_to": None, "backends": []},
    ]


def test_direct_calls_are_for_plain_tensors_that_nobody_watches():
    A = torch.ones(1, 2, 3)
    assert direct([A]) and direct([torch.nn.Parameter(A, requires_grad=False)])
    w = A.clone().requires_grad_()
    assert not direct([w])
    with torch.no_grad():
        assert direct([w])
    with torch.autograd.forward_ad.dual_level():
        assert not direct([A])
    assert not direct([A.as_subclass(type("Wrapped", (torch.Tensor,), {}))])
    with torch._subclasses.FakeTensorMode() as mode:
        assert not direct([mode.from_tensor(A)])
    assert torch.func.vmap(lambda t: t * direct([t]))(A).sum() == 0


def test_ops_are_reachable_under_every_name():
    assert teleport_fast.set_backend is set_backend and teleport_fast.backends is backends
    assert teleport_fast.ops.gram_difference is gram_difference and teleport_fast.ops.group_action is group_action


def run(code: str, **environment: str) -> str:
    command, environment = [sys.executable, "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_the_environment_chooses_the_instruction_set():
    if availability("cpp") is not True:
        pytest.skip(str(availability("cpp")))
    code = (
        "import torch; from teleport_fast.ops.backend import availability; from teleport_fast import _C;"
        "print(availability('cpp'), torch.ops.teleport_fast_cpp.isa(), _C.build_info()['isa'])"
    )
    assert run(code, TELEPORT_FAST_ISA="default") == "True default default"
    refused = run(
        "from teleport_fast.ops.backend import availability; print(availability('cpp'))", TELEPORT_FAST_ISA="mmx"
    )
    assert "TELEPORT_FAST_ISA=mmx" in refused and "default, avx2, avx512" in refused


def test_without_the_library_every_op_still_computes():
    code = (
        "import pathlib; exists = pathlib.Path.exists;"
        "pathlib.Path.exists = lambda self, **k: self.name != '_ops.so' and exists(self, **k);"
        "import torch, teleport_fast as tf;"
        "print(tf.backends()['cpp']); print(tf.ops.gram_difference(torch.ones(1, 1, 2), torch.ones(1, 1, 3))[0].item())"
    )
    reason, value = run(code).splitlines()
    assert "is not built" in reason and "pip install" in reason and value == "1.0"
