"""A compiled model is proven without its compiler: every wrong move and every copy would compile it anew."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def eagerly(model: nn.Module) -> AbstractContextManager[object]:
    """Within it, modules that torch.compile wrapped (or `module.compile()` changed) are called as they were written."""
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
