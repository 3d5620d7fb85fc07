"""What the tests of all ops share: backends, instruction sets, layouts of views, exact arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from teleport_fast.ops.backend import availability, set_backend

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _instruction_sets() -> list[str]:
    """Those of default, avx2, avx512 that this CPU has."""
    if availability("cpp") is not True:
        return []
    before, found = torch.ops.teleport_fast_cpp.isa(), []
    for isa in ("default", "avx2", "avx512"):
        with contextlib.suppress(RuntimeError):
            found.append(torch.ops.teleport_fast_cpp.isa(isa))
    torch.ops.teleport_fast_cpp.isa(before)
    return found


CPP_WAYS = [f"cpp-{isa}" for isa in _instruction_sets()]


def _use(name: str) -> Iterator[str]:
    backend, _, isa = name.partition("-")
    with set_backend(backend):
        if not isa:
            yield name
            return
        before = torch.ops.teleport_fast_cpp.isa()
        torch.ops.teleport_fast_cpp.isa(isa)
        yield name
        torch.ops.teleport_fast_cpp.isa(before)


@pytest.fixture(params=["reference", *CPP_WAYS])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and cpp once per instruction set."""
    yield from _use(request.param)


@pytest.fixture(params=CPP_WAYS)
def cpp_way(request: pytest.FixtureRequest) -> Iterator[str]:
    """cpp once per instruction set; without the extension the test is skipped."""
    yield from _use(request.param)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def _columns(tensor: Tensor) -> Tensor:
    """Rows contiguous, heads side by side: how a linear layer's weight shows the joint it reads."""
    heads, h, n = tensor.shape
    return tensor.permute(2, 0, 1).contiguous().view(n, heads, h).permute(1, 2, 0)


def _strided(tensor: Tensor) -> Tensor:
    """No dimension contiguous, and a storage offset."""
    heads, h, n = tensor.shape
    big = torch.full((heads, h + 1, 2 * n + 1, 3), float("nan"), dtype=tensor.dtype)
    view = big[:, 1:, 1::2, 1]
    view.copy_(tensor)
    return view


def _split(tensor: Tensor) -> Tensor:
    """Columns of two strides, (outer, inner), as a shared head or a convolution has them."""
    heads, h, n = tensor.shape
    inner = next(d for d in (3, 2, 1) if n % d == 0)
    big = torch.full((n // inner, heads, h, inner + 1), float("nan"), dtype=tensor.dtype)
    view = big.permute(1, 2, 0, 3)[..., :inner]
    view.copy_(tensor.reshape(heads, h, n // inner, inner))
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": _rows,
    "columns": _columns,
    "strided": _strided,
    "split": _split,
}


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Lays a (heads, h, n) tensor out in memory; the values stay."""
    return LAYOUTS[request.param]


@pytest.fixture
def exact() -> Callable[[Tensor], np.ndarray]:
    """(heads, h, n) in extended precision, in which products and sums of what a float64 holds round at 2^-64."""
    return lambda tensor: tensor.detach().flatten(2).double().numpy().astype(np.longdouble)


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """torch.empty returns NaN: what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)
