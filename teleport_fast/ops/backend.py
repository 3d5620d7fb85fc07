"""Chooses who computes an op: who was asked for, who can on this input, and who was measured to be fastest."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from functools import cache, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "cpp", "triton", "cuda")
_PACKAGE = Path(__file__).resolve().parent.parent
_REBUILD = "pip install --no-build-isolation --no-deps -e ."
_PREFERENCES: dict[str, Any] = json.loads((Path(__file__).parent / "preferences.json").read_text())

_process_wide = "auto"
_in_this_context: ContextVar[str | None] = ContextVar("teleport_fast_backend", default=None)


class set_backend:
    """Choose the backend of all ops: "auto" (measured table), "reference", "cpp", "triton" or "cuda".

    Called, it holds for the process; as a context manager, for the thread (and asyncio task) inside the block only.
    Errors: ValueError for an unknown name; RuntimeError for a backend that this installation does not have.

    >>> with set_backend("reference"):
    ...     current_backend()
    'reference'
    """

    def __init__(self, name: str) -> None:
        global _process_wide
        if name != "auto":
            if name not in BACKENDS:
                names = ", ".join(BACKENDS)
                raise ValueError(f"backend must be one of auto, {names}, got {name!r}; see teleport_fast.backends()")
            reason = availability(name)
            if reason is not True:
                raise RuntimeError(f"backend {name!r} is not available: {reason}")
        self._name, self._before = name, _process_wide
        self._token: Token[str | None] | None = None
        _process_wide = name

    def __enter__(self) -> set_backend:
        global _process_wide
        _process_wide = self._before
        self._token = _in_this_context.set(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _in_this_context.reset(self._token)


def current_backend() -> str:
    """The name that was chosen last: by an enclosing `with set_backend(...)`, else for the process; "auto" at first."""
    return _in_this_context.get() or _process_wide


def backends() -> dict[str, bool | str]:
    """Every backend: True, or the reason why this installation does not have it.

    >>> backends()["reference"]
    True
    """
    return {name: availability(name) for name in BACKENDS}


@cache
def availability(name: str) -> bool | str:
    """True, or why this installation does not have the backend; found once per process."""
    return {"reference": lambda: True, "cpp": _cpp, "triton": _triton, "cuda": _cuda}[name]()


def _cpp() -> bool | str:
    return _load(_PACKAGE / "_ops.so")


def _cuda() -> bool | str:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # The schemas of both libraries are in _ops.so.
    schemas = availability("cpp")
    return _load(_PACKAGE / "_ops_cuda.so") if schemas is True else schemas


def _load(library: Path) -> bool | str:
    if not library.exists():
        return f"{library.name} is not built; {_REBUILD}"
    try:
        torch.ops.load_library(str(library))
        if library.name == "_ops.so":
            torch.ops.teleport_fast_cpp.isa()
    except (OSError, RuntimeError) as error:
        # torch names the file alone; the loader's own words (a symbol that is missing, a wrong architecture) are the cause
        return f"{library.name} does not load: {str(error.__cause__ or error).splitlines()[0]}; {_REBUILD}"
    return True


def _triton() -> bool | str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(pkgutil.iter_modules([str(_PACKAGE / "kernels")])):
        return "this version has no Triton kernels"
    if not torch.cuda.is_available() and not _interpreted():
        return "torch sees no GPU"
    return True


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _widest(op: str, float64: bool) -> int:
    """The largest width that the op's CUDA kernel takes on the current device; -1: any."""
    widest: int = torch.ops.teleport_fast_cpp.widest(op, float64)
    return widest


def _isa() -> str:
    """The instruction set of the C++ kernels; empty without them."""
    return str(torch.ops.teleport_fast_cpp.isa()) if availability("cpp") is True else ""


def layout_of(tensors: Sequence[Tensor]) -> str:
    """"columns" where every (heads, h, …) tensor's rows are neighbours in memory, as a layer that reads a joint stores
    them; "rows" where no one's are; empty where both occur."""
    kinds = {t.stride(1) == 1 and t.shape[1] > 1 for t in tensors}
    return "" if len(kinds) > 1 else "columns" if kinds.pop() else "rows"


class Op:
    """The implementations of one op, all with the signature of its reference; the others are found by the op's name.

    cpp and cuda: `torch.ops.teleport_fast_cpp.NAME`, by device. triton: function NAME of `kernels/NAME.py`, the file
    without the underscore that marks an op as in place.
    """

    def __init__(self, name: str, reference: Callable[..., Any]) -> None:
        self.name, self.reference = name, reference
        rows = [key for machine in _PREFERENCES["ops"].get(name, {}).values() for key in machine]
        self._by_layout = any(key.endswith(("/rows", "/columns")) for key in rows)
        self._choose = lru_cache(maxsize=1024)(self._choose_uncached)

    def can_use(self, backend: str, device: str, dtypes: frozenset[torch.dtype], size: int = 0) -> bool | str:
        """True, or why the backend cannot compute this op on tensors of these dtypes and size on this type of device."""
        if backend == "reference":
            return True
        if availability(backend) is not True:
            return availability(backend)
        triton = ("cuda", "cpu") if _interpreted() else ("cuda",)
        needed = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": triton}[backend]
        if device not in needed:
            return f"it computes on {' and '.join(needed)}, the tensors are on {device}"
        if self._kernel(backend) is None:
            return f"it has no kernel for {self.name}"
        widest = _widest(self.name, torch.float64 in dtypes) if backend == "cuda" else -1
        if 0 <= widest < size:
            return f"its kernel holds widths up to {widest} in this device's shared memory, got {size}; plain torch takes any"
        return True

    def prefer(self, device: str, dtypes: frozenset[torch.dtype], size: int, layout: str = "") -> list[str]:
        """Backends, fastest first, for this size: what preferences.json says, the reference last.

        The table's keys are the instruction set of the C++ kernels ("cpu" where it does not matter) or another device,
        then "dtype/layout", "dtype" or "any"; each of its rows holds up to a largest size (null: any). Where nothing was
        measured nothing is preferred.
        """
        table = _PREFERENCES["ops"].get(self.name, {})
        machine = table.get(_isa() if device == "cpu" else device) or (table.get("cpu", {}) if device == "cpu" else {})
        dtype = str(next(iter(dtypes))).removeprefix("torch.") if len(dtypes) == 1 else "mixed"
        for row in machine.get(f"{dtype}/{layout}") or machine.get(dtype) or machine.get("any") or []:
            if row["up_to"] is None or size <= row["up_to"]:
                return [*row["backends"], "reference"]
        return ["reference"]

    def choose(self, tensors: Sequence[Tensor], size: int) -> Callable[..., Any]:
        """The implementation for this input: the backend asked for, or under "auto" the preferred one that can be used.

        size: the number that decides which backend is fastest, the one the op's rows of preferences.json speak of.
        Errors: RuntimeError if the backend asked for cannot be used on these tensors.
        """
        layout = layout_of(tensors) if self._by_layout else ""
        dtypes = frozenset([t.dtype for t in tensors])
        chosen: Callable[..., Any] = self._choose(current_backend(), tensors[0].device.type, dtypes, size, layout)
        return chosen

    def _choose_uncached(self, asked: str, device: str, dtypes: frozenset[torch.dtype], size: int, layout: str = "") -> Any:
        if asked != "auto":
            reason = self.can_use(asked, device, dtypes, size)
            if reason is not True:
                raise RuntimeError(f"backend {asked!r} cannot compute {self.name}: {reason}; use set_backend('auto')")
            return self._kernel(asked)
        order = self.prefer(device, dtypes, size, layout)
        return next(self._kernel(name) for name in order if self.can_use(name, device, dtypes, size) is True)

    def _kernel(self, backend: str) -> Any:
        if backend == "reference":
            return self.reference
        if backend == "triton":
            module = f"teleport_fast.kernels.{self.name.rstrip('_')}"
            if importlib.util.find_spec(module) is None:
                return None
            return getattr(importlib.import_module(module), self.name)
        name, key = f"teleport_fast_cpp::{self.name}", "CPU" if backend == "cpp" else "CUDA"
        if not torch._C._dispatch_has_kernel(name) or not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            return None
        return getattr(torch.ops.teleport_fast_cpp, self.name).default


def direct(tensors: Sequence[Tensor]) -> bool:
    """True where a kernel may be called without the dispatcher: nothing records, traces or transforms the call.

    The detour costs 20 to 40 us a call, more than a small op itself (10 us).
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
        if recording and tensor.requires_grad:
            return False
    return True
