"""Example inputs for the probe, guessed from a model's first layer when the user gives none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Where a model without a table of positions (rotary) says how many tokens it takes.
_CONTEXT = ("context", "block_size", "n_positions", "max_position_embeddings", "max_seq_len")


def guess_inputs(model: nn.Module) -> tuple[Tensor, ...]:
    """Token ids for a model that begins with an embedding, normal noise for one that begins with a linear layer.

    Returns a tuple of one tensor: (2, t) int64 with t at most 12, or (4, in_features) float.
    Errors: ValueError when the first layer with parameters is neither.
    """
    generator = torch.Generator().manual_seed(7)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            length = min(12, *(table.num_embeddings for table in tables), *_contexts(model))
            ids = torch.randint(module.num_embeddings, (2, length), generator=generator)
            return (ids.to(device),)
        if isinstance(module, nn.Linear):
            return (torch.randn(4, module.in_features, generator=generator, dtype=torch.float64).to(device),)
        if list(module.parameters(recurse=False)) and not list(module.children()):
            break
    raise ValueError("example_inputs is None and cannot be guessed for this model; pass a tuple or a dict of keywords")


def _contexts(model: nn.Module) -> list[int]:
    values = [getattr(owner, name, None) for owner in (model, getattr(model, "config", None)) for name in _CONTEXT]
    return [value for value in values if isinstance(value, int) and value > 0]
