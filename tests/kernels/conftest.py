"""What the kernel tests stand on: views in poisoned memory, and Triton's interpreter as an instrument.

Without a GPU the kernels run in the interpreter, here made faster, right about bfloat16, and able to count the bytes
that a kernel moves; only functions of the interpreter's own module are wrapped, never a kernel. With a GPU the same
tests run on it, and those that count are skipped. tests/conftest.py sets TRITON_INTERPRET before kernels are imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
SECTOR = 32  # bytes: the unit in which a GPU's memory is read and written
Builder = interpreter.InterpreterBuilder


class _Unchanged:
    def restore(self) -> None:
        """A scope that patched nothing."""


def patch_language_once() -> None:
    """Patches the language once per launch: by itself the interpreter does it again in every nested function call.

    A launch of `square_sums` with 30 programs takes 1.1 s as shipped in triton 3.7.1 and 0.06 s so.
    """
    patched: set[str] = set()
    original = interpreter._patch_lang

    def patch(fn: Any) -> Any:
        names = {m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core}
        if names <= patched:
            return _Unchanged()
        scope = original(fn)
        # Triton 3.6 converts arrays of one entry and one axis, which numpy 2.4 refuses.
        tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        patched.update(names)
        restore = scope.restore

        def restored() -> None:
            restore()
            patched.difference_update(names)

        scope.restore = restored
        return scope

    interpreter._patch_lang = patch


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.bfloat16)
    return tensor.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def repair_bfloat16() -> None:
    """Rounds float32 to bfloat16 to nearest even, and multiplies bfloat16 matrices as numbers instead of as bits."""
    cast, dot = Builder.cast_impl, Builder.create_dot

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = interpreter.TensorHandle(_to_float32(src.data), tl.float32)
            return wide if target == tl.float32 else cast(self, wide, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def numeric_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_to_float32(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *args)

    Builder.cast_impl, Builder.create_dot = rounding_cast, numeric_dot
    Builder.create_fp_to_fp = lambda self, src, dst_type, _mode: self.cast_impl(src, dst_type)


@dataclass
class Traffic:
    """Bytes of global memory that the launches in a `counted` block asked for, and the 32-byte sectors they touched."""

    loaded: int = 0
    stored: int = 0
    sectors: int = 0
    launches: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    @property
    def sector_ratio(self) -> float:
        """Bytes of the touched sectors against bytes asked for; 1 means that nothing was fetched in vain."""
        return self.sectors * SECTOR / self.bytes


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts every load and store, the tables' included; an entry read twice counts twice, as no cache is assumed.

    Sectors are those of one load or store instruction of a whole program: what its threads ask for together.
    """
    traffic = Traffic()
    load, store, run = Builder.create_masked_load, Builder.create_masked_store, interpreter.InterpretedFunction.run

    def touch(pointers: Any, mask: Any) -> int:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        first, last = addresses // SECTOR, (addresses + np.uint64(size - 1)) // SECTOR
        traffic.sectors += len(np.unique(np.concatenate([first, last])))
        return size * addresses.size

    def counting_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        traffic.loaded += touch(pointers, mask)
        return load(self, pointers, mask, *args)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        traffic.stored += touch(pointers, mask)
        return store(self, pointers, value, mask, *args)

    def counting_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.launches.append(self.__name__)
        return run(self, *args, **kwargs)

    Builder.create_masked_load, Builder.create_masked_store = counting_load, counting_store
    interpreter.InterpretedFunction.run = counting_run
    try:
        yield traffic
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store
        interpreter.InterpretedFunction.run = run


if INTERPRETED:
    patch_language_once()
    repair_bfloat16()


@pytest.fixture
def device() -> str:
    """Where the kernels run: "cuda", or "cpu" in the interpreter."""
    return DEVICE


@pytest.fixture
def traffic() -> Callable[[], AbstractContextManager[Traffic]]:
    """The counting block; skipped where kernels run on a GPU, whose counters a profiler reads."""
    if not INTERPRETED:
        pytest.skip("bytes are counted in the interpreter, and the kernels are compiled here")
    return counted


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that an entry that a kernel forgets to write cannot pass for a result."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@dataclass
class Placed:
    """A view (heads, h, …) that lies in a buffer of NaN."""

    view: Tensor
    buffer: Tensor

    def alone(self) -> bool:
        """Whether every entry of the buffer that is not the view's is still NaN; clears the view."""
        self.view.fill_(float("nan"))
        return bool(self.buffer.isnan().all())


# How a parameter shows a joint; sizes are odd where a kernel's vectors or tiles could be caught out.
KINDS = ("rows", "columns", "shared", "convolution", "offset", "strided", "vector", "empty")


def place(kind: str, heads: int, h: int, n: int, dtype: torch.dtype) -> Placed:
    """A random view of one of `KINDS` with n columns or about as many."""
    sizes = {
        "rows": (heads, h, n),
        "columns": (n, heads, h),
        "shared": (heads, 2, h, n // 2),
        "convolution": (n // 9 + 1, heads, h, 9),
        "offset": (heads, h, n + 1),
        "strided": (heads, h, n, 2),
        "vector": (heads, h, 1),
        "empty": (heads, h, 0),
    }[kind]
    count = int(np.prod(sizes))
    buffer = torch.full((count + 32,), float("nan"), dtype=dtype, device=DEVICE)
    whole = buffer[16 : 16 + count].view(sizes)
    view = {
        "columns": lambda: whole.permute(1, 2, 0),
        "shared": lambda: whole.permute(0, 2, 1, 3),
        "convolution": lambda: whole.permute(1, 2, 0, 3),
        "offset": lambda: whole[:, :, 1:],
        "strided": lambda: whole[..., 1],
    }.get(kind, lambda: whole)()
    view.copy_(torch.randn(view.shape, dtype=torch.float64))
    return Placed(view, buffer)


@pytest.fixture
def placed() -> Callable[..., Placed]:
    return place


@pytest.fixture
def all_kinds() -> Callable[..., list[Placed]]:
    """(heads, h, n, dtype) → one view of every kind."""
    return lambda heads, h, n, dtype: [place(kind, heads, h, n, dtype) for kind in KINDS]


@pytest.fixture
def assert_twice_as_close() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Fails if `found` is further from the float64 truth than twice what torch gets in the same storage type."""

    def check(found: Tensor, plain: Tensor, truth: Tensor) -> None:
        assert found.shape == truth.shape and found.isfinite().all()
        if not truth.numel():
            return
        scale = truth.abs().max().item()
        error, torch_error = ((x.double() - truth).abs().max().item() for x in (found, plain))
        # Where torch happens to be exact two roundings of the largest entry are allowed; in float64, where torch is the
        # truth itself and as wrong as the kernel, 64.
        floor = (64 if found.dtype == torch.float64 else 2) * torch.finfo(found.dtype).eps * scale
        assert error <= max(2 * torch_error, floor), f"{error} against {torch_error}"

    return check
