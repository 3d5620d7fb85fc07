"""What every test stands on: one seed, two threads (one where workers share the cores), Triton's interpreter where there is no GPU."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import types
from pathlib import Path

# Read once, when torch (OpenMP) and triton are first imported: so before both.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import pytest
import torch

THREADS = torch.get_num_threads()
GPU_MISSING = None if torch.cuda.is_available() else f"needs a CUDA device; torch {torch.__version__} sees none here"
if GPU_MISSING:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# bench/ lies beside the package: it is made known alone, since with its parent the top-level `kernels` would be too.
if "bench" not in sys.modules:
    sys.modules["bench"] = types.ModuleType("bench")
    sys.modules["bench"].__path__ = [str(Path(__file__).resolve().parent.parent / "bench")]

with contextlib.suppress(ImportError):  # absent on some GPU machines, where the tests that need it are not collected
    from hypothesis import settings

    # The same examples on every run and machine; no deadline, since a first call may compile.
    settings.register_profile("teleport_fast", derandomize=True, deadline=None)
    settings.load_profile("teleport_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` with the reason where torch sees no CUDA device."""
    if GPU_MISSING:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=GPU_MISSING))


@pytest.fixture(autouse=True)
def same_seed_and_settings() -> None:
    """Every test starts from seed 0, float32 and the same number of threads, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread(same_seed_and_settings: None) -> None:
    """For what is timed by one thread's processor time, or too small for two."""
    torch.set_num_threads(1)
