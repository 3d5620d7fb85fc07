"""Loads launch.cpp, built over the emulator, as torch ops on CPU tensors, and lets `set_backend("cuda")` choose them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport_fast.ops import backend
from teleport_fast.ops.backend import Op, set_backend

OPS = Path(__file__).resolve().parent.parent.parent / "csrc" / "ops.cpp"


class Device(ctypes.Structure):
    """host/cuda_runtime_api.h: EmulatedDevice."""

    _fields_ = [(name, ctypes.c_int) for name in ("capturing", "shared_bytes", "multiprocessors", "copies")]


class Launched:
    """The ops in `ops`, what the device is taken for in `device`."""

    def __init__(self, library: Path, kernels: Path) -> None:
        self.schemas = torch.library.Library("teleport_fast_emulated", "DEF")
        for literals in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', OPS.read_text(encoding="utf-8")):
            self.schemas.define("".join(re.findall(r'"([^"]*)"', literals)))
        self.kernels = ctypes.CDLL(str(kernels))
        self.kernels.emu_error.restype = ctypes.c_char_p
        torch.ops.load_library(str(library))
        host = ctypes.CDLL(str(library))
        host.emulated_device.restype = ctypes.POINTER(Device)
        self.device = host.emulated_device().contents
        self.ops = torch.ops.teleport_fast_emulated

    @contextmanager
    def chosen(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """Inside, backend "cuda" is available and computes on CPU tensors."""
        self.reset()
        available, choose = backend.availability, Op.choose

        def chosen(op: Op, tensors: Sequence[Tensor], size: int) -> Any:
            if backend.current_backend() != "cuda":
                return choose(op, tensors, size)
            widest = self.ops.widest(op.name, torch.float64 in {t.dtype for t in tensors})
            return getattr(self.ops, op.name).default if not 0 <= widest < size else op.reference

        with monkeypatch.context() as patch:
            patch.setattr(backend, "availability", lambda name: name == "cuda" or available(name))
            patch.setattr(Op, "choose", chosen)
            with set_backend("cuda"):
                yield self

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """A CUDA graph is being captured: copies, events and new host memory are errors."""
        self.device.capturing = 1
        try:
            yield
        finally:
            self.device.capturing = 0

    def reset(self, seed: int = 0) -> None:
        """Forgets counts and faults; all memory may be read and written, since torch hands it out unasked."""
        self.kernels.emu_reset(ctypes.c_uint(seed))
        self.kernels.emu_register(None, ctypes.c_int64(2**63 - 1), ctypes.c_int(1))
        self.device.copies = 0
