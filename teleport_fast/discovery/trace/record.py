"""Record one call of a model: its tape, with the model's outputs pinned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from teleport_fast.discovery.trace import layers
from teleport_fast.discovery.trace.rules import RULES
from teleport_fast.discovery.trace.tape import Alias, Tape


def record(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], call: Callable[[], Any]) -> Tape:
    """The tape of `call`, which calls a model that holds these tensors in eval mode; its outputs must not move.

    torch's fused attention is taken apart for it: the fast path of TransformerEncoderLayer is switched off, and
    scaled_dot_product_attention computes by its formula.
    """
    assert layers.__name__  # the import registers the layers' rules
    tape = Tape({**buffers, **parameters}, buffers, RULES)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), tape:
            outputs = call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for leaf in tree_leaves(outputs):
        known = tape.known(leaf)
        if isinstance(known, Tensor):
            tape.units.pin(known, "it is an output of the model")
        elif isinstance(known, Alias):
            tape.hide(known, "it is an output of the model")
    return tape
