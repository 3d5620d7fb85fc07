"""Every Triton kernel compiles to machine code for every target without a spill; the table that says so is whole."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench/resources_triton.py"
TABLE = ROOT / "bench/resources.md"
# Every kernel once, where registers are tightest; the table holds all configurations.
TIGHTEST = (
    "square_sums fp16|square_sums reduce fp32|diagonal_action_ bf16|gram bf16 h≤128|gram total fp32|"
    "group_action_ fp16 h≤64|covariance_ update fp32|grad_norm_objective fp32 h≤64|matrix_exp fp32 h≤64|"
    "teleport_adamw_ fp32|activation_action bf16|"
    "permutation_action_ 32-bit h≤4096|rotate_step_ fp32 h≤64|rotate_step_ map fp64"
)


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Interpreted functions cannot be compiled, and this process interprets them.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)


def test_the_tightest_configurations_compile_without_a_spill_on_every_target():
    done = compiled("--only", TIGHTEST)
    failed = [line for line in done.stderr.splitlines() if line.startswith("resources_triton: ")]
    here = importlib.metadata.version("triton")
    if f"triton {here}," not in TABLE.read_text(encoding="utf-8"):
        # another triton's registers are its own; what does not compile, or takes too much shared memory, is still an error
        assert done.returncode == bool(failed) and not [line for line in failed if not line.endswith(" bytes spilled")], done.stderr
        if failed:
            pytest.skip(f"bench/resources.md is another triton's; all compile, but triton {here} spills: {'; '.join(failed)}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fp32") >= 6


def test_a_configuration_that_does_not_exist_fails():
    assert compiled("--only", "no such kernel").returncode == 1


def test_interpreting_and_compiling_at_once_is_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode != 0
    assert "unset it" in done.stderr


KERNELS = ["square_sums", "diagonal_action", "gram", "group_action", "covariance", "grad_norm_objective", "matrix_exp"]


@pytest.mark.parametrize("name", [*KERNELS, "teleport_adamw", "activation_action", "permutation_action", "rotate_step"])
def test_the_table_lists_every_shipped_configuration_and_no_spill(name):
    module = __import__(f"teleport_fast.kernels.{name}", fromlist=["shipped"])
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| triton |")]
    cells = {row[1]: row[2:] for row in rows}
    for configuration in module.shipped():
        warps, *targets = cells[configuration.label]
        assert int(warps) == configuration.num_warps, f"{configuration.label}: run bench/resources.py"
        assert all(target.split(" / ")[1] == "0" for target in targets)
