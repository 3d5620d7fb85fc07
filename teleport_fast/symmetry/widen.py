"""A mode under which a model's own casts to float32 give float64, so that a proof in float64 is one throughout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WideCasts(TorchFunctionMode):
    """Every request for float32 (`.float()`, `.to(torch.float32)`, `dtype=torch.float32`) is one for float64.

    `casts` counts float64 tensors that would have been narrowed: above 0, the model itself computes in float32 (norms,
    softmax, rotary angles, routers of transformers), and natively deviates by about 1e-7 even in float64.
    Source: own derivation, checked by tests/symmetry/test_widen.py.

    >>> with WideCasts() as mode:
    ...     torch.ones(2, dtype=torch.float64).float().dtype, mode.casts
    (torch.float64, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        narrow = func is Tensor.float
        if narrow:
            func = Tensor.double
        if any(arg is torch.float32 for arg in args):
            narrow, args = True, tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if keywords.get("dtype") is torch.float32:
            narrow, keywords["dtype"] = True, torch.float64
        result = func(*args, **keywords)
        if narrow and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            self.casts += 1
            if result is args[0]:
                result = result.clone()  # a cast copies, which makes strides those of a dense tensor
        return result
