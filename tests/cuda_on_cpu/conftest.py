"""Fixtures that run csrc/cuda on the CPU: the compiled kernels, and the views their tests put in."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load(name: str) -> ModuleType:
    """A neighbouring file as a module; tests are imported by path, so that a plain import would not find it."""
    full_name = f"cuda_on_cpu_{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[full_name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full_name]


emulated = _load("emulated")


@pytest.fixture(scope="session")
def library() -> Path:
    if emulated.compiler() is None:
        pytest.skip("needs a C++17 compiler (g++) to run the CUDA kernels on the CPU")
    return emulated.build()


@pytest.fixture
def emulator(library: Path) -> Iterator[Any]:
    """The emulator with seed 0; `emulator.seed = n` shuffles blocks and threads another way."""
    yield emulated.Emulated(library)


@pytest.fixture(scope="session")
def launched(library: Path) -> Any:
    """The torch side of the kernels, launch.cpp, on CPU tensors: see launched.py."""
    return _load("launched").Launched(emulated.build_launch(library), library)


@pytest.fixture
def kernels(emulator: Any) -> Any:
    """The ops of csrc/cuda as Python functions over lists of views."""
    return _load("kernels").Kernels(emulator)
