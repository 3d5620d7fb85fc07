"""bench.ratios: every op is measured beside torch, a copy and the BLAS; a comparison and the guard tell a change from noise."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.ratios import cases as cases_module
from bench.ratios.__main__ import OPS, main
from bench.ratios.cases import Case, cases
from bench.ratios.compare import changes, verdict
from bench.ratios.guard import RECORDED, other_machine, recorded, slower, speed
from bench.ratios.measure import measure
from teleport_fast import ops
from teleport_fast.ops.backend import Op, availability
from teleport_fast.ops.square_sums import _OP as square_sums_op

needs_cpp = pytest.mark.skipif(availability("cpp") is not True, reason="the extension is not built")

pytestmark = pytest.mark.usefixtures("one_thread")


def sleeping(name: str, ours: float, theirs: float) -> Case:
    """A case of known times, in milliseconds of work."""

    def work(milliseconds: float) -> None:
        end = time.thread_time() + milliseconds / 1e3
        while time.thread_time() < end:
            pass

    return Case(name, "float32", "1", 8000, 1e6, lambda: work(ours), lambda: work(theirs))


def test_every_op_of_the_package_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases_module, "SIZES", ((2, 4, 8),))
    monkeypatch.setattr(cases_module, "MIDDLE", (2, 4, 8))
    monkeypatch.setattr(cases_module, "NETWORKS", {(2, 4, 8): ((20, 8, 6, 3), 30)})
    found = list(cases())
    measured = {case.op.removesuffix(" both sides") for case in found}
    # group_action's kernel is that of group_action_
    assert measured == set(ops.__all__) - {"group_action"} and {case.op for case in found} == set(OPS)
    assert {case.dtype for case in found} == {"float32", "float64", "bfloat16"}
    assert all(case.bytes > 0 and case.flops > 0 for case in found)
    for case in found:
        with torch.no_grad():
            case.call()
            (case.by_torch or case.call)()


@pytest.mark.parametrize("op", ["gram_difference", "rotate_step_", "rotate_step_ both sides", "group_action_"])
def test_operations_by_formula_are_those_of_the_products(op: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = next(case for case in cases_module.cases_of(torch.float32, 2, 16, 96) if case.op == op)
    assert case.by_torch is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.by_torch()
    full = counter.get_total_flops()
    # torch computes both triangles of a Gram, and counts no elementwise step
    low, high = ((1 + 1 / 16) / 2, (1 + 1 / 16) / 2) if op == "gram_difference" else (1.0, 1.25)
    assert low * full <= case.flops <= high * full * (1 + 1e-9)


def test_a_row_holds_ratios_and_no_times() -> None:
    row = measure(sleeping("op", 0.5, 1.0), ["reference"], rounds=5, least=0.0)
    # The faster of the two plain routes is what all are compared with.
    assert row["baseline"] == "reference" and row["routes"]["reference"]["speed"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert 0.4 < row["routes"]["torch"]["speed"]["median"] < 0.62
    assert set(row["routes"]["reference"]) == {"speed", "over_clone", "over_copy", "of_blas", "of_roof"}
    assert not any(key in ("seconds", "ms", "us") for key in row)


def a_run(**speeds: tuple[float, float, float]) -> dict[str, Any]:
    routes = {name: {"speed": dict(zip(("low", "median", "high"), three, strict=True))} for name, three in speeds.items()}
    return {"machine": {"isa": "avx2"}, "rows": [{"op": "op", "dtype": "float32", "size": "1", "routes": routes}]}


def test_only_what_leaves_the_spread_is_a_change() -> None:
    old = a_run(cpp=(1.9, 2.0, 2.1), auto=(0.5, 2.0, 4.0), torch=(1.0, 1.0, 1.0))
    assert changes(a_run(cpp=(1.0, 1.1, 1.2), auto=(1.0, 1.1, 1.2)), old) == [
        "worse   op float32 1 cpp: 2.00 [1.90, 2.10] -> 1.10 [1.00, 1.20] of torch's speed", "1 of 2 routes changed beyond their spread"
    ]
    assert changes(old, old) == ["0 of 2 routes changed beyond their spread"]
    # Quartiles that happen to be tight do not make 2% a change.
    assert verdict({"low": 1.02, "median": 1.02, "high": 1.02}, {"low": 1.0, "median": 1.0, "high": 1.0}) == ""
    other = copy.deepcopy(old)
    other["machine"]["isa"] = "avx512"
    assert "not the same kernels" in changes(other, old)[0]


@needs_cpp
def test_the_command_writes_json_and_a_picture_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    assert main(["--quick", "--only", "square_sums", "--out", str(out)]) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    assert [row["op"] for row in found["rows"]] == ["square_sums"] and {"torch", "cpp", "auto"} <= set(found["rows"][0]["routes"])
    for route in found["rows"][0]["routes"].values():
        route["speed"] = {key: 1e3 * value for key, value in route["speed"].items()}
    before = tmp_path / "before.json"
    before.write_text(json.dumps(found))
    assert main(["--quick", "--only", "square_sums", "--out", str(out), "--compare", str(before), "--strict"]) == 1
    assert "worse   square_sums float32" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--compare", str(tmp_path / "missing.json")])
    assert "missing.json is not there; measure it with" in capsys.readouterr().err


def test_the_guard_catches_a_slow_kernel_and_lets_a_sound_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.ratios.guard.ATTEMPTS", ((3, 0.0), (3, 0.0)))
    monkeypatch.setattr("bench.ratios.guard.speed", lambda case, *_: {"sound": 1.3, "slow": 0.9}[case.op])
    sound, slow = (replace(sleeping("op", 0.1, 0.2), op=name) for name in ("sound", "slow"))
    lines = slower([sound, slow], {sound.name: ("torch", 2.0), slow.name: ("torch", 2.0)})
    assert lines == ["slow float32 1: 0.90 of torch's speed, recorded 2.00, allowed 1.20"]


@needs_cpp
def test_the_guard_sees_a_kernel_that_computes_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in cases(quick=True, only=("square_sums",)))
    now = speed(case, "torch", 5, 0.05)
    assert slower([case], {case.name: ("torch", now)}) == []
    right = Op._kernel

    def thrice(self: Op, backend: str) -> Any:
        kernel = right(self, backend)

        def slow(*arguments: Any) -> Any:
            kernel(*arguments)
            kernel(*arguments)
            return kernel(*arguments)

        return slow if (self.name, backend) == (case.op, "cpp") else kernel

    monkeypatch.setattr(Op, "_kernel", thrice)
    square_sums_op._choose.cache_clear()
    try:
        lines = slower([case], {case.name: ("torch", now)})
    finally:
        square_sums_op._choose.cache_clear()
    assert len(lines) == 1 and lines[0].startswith("square_sums float32")


@needs_cpp
def test_no_kernel_is_much_slower_than_recorded() -> None:
    """The regression guard: ratios to torch's own route against bench/recorded/ratios.json, with room for a busy machine."""
    run = json.loads(RECORDED.read_text())
    if reason := other_machine(run):
        pytest.skip(reason)
    before = recorded(run)
    measured = list(cases(quick=True))
    assert len([case for case in measured if case.name in before]) == len(OPS)
    lines = slower(measured, before)
    assert not lines, "\n".join(lines)
