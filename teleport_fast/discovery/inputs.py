"""Example inputs for the probe, guessed from a model's first layer when the user gives none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Where a model without a table of positions (rotary) says how many tokens it takes.
_CONTEXT = ("context", "block_size", "n_positions", "max_position_embeddings", "max_seq_len")


def guess_inputs(model: nn.Module) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Token ids for a model that begins with an embedding, normal noise for one that begins with a linear layer.

    Returns a tuple of one tensor: (2, t) int64 with t at most 12, or (4, in_features) float; for a model that names its
    inputs as those of transformers do (`main_input_name` and a config) a dict of keywords: ids, pixels or audio features.
    Errors: ValueError when the first layer with parameters is neither.
    """
    generator = torch.Generator().manual_seed(7)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    named = _by_config(model, generator)
    if named:
        return {name: value.to(device) for name, value in named.items()}
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


def _by_config(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """What a transformers model is called with, read off its config; empty for any other model."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return {}
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", None)
    inputs: dict[str, Tensor] = {}
    vocabulary = getattr(text, "vocab_size", 0)
    length = min(12, *(_contexts(model) or [12]))

    def ids() -> Tensor:
        return torch.randint(vocabulary, (2, length), generator=generator)

    if main == "input_ids" and vocabulary:
        inputs["input_ids"] = ids()
    if main == "pixel_values" or (inputs and vision is not None):
        inputs["pixel_values"] = _pixels(vision or config, generator)
    if main == "input_features":
        frames = 2 * config.max_source_positions  # the front halves them
        inputs["input_features"] = torch.randn(2, config.num_mel_bins, frames, generator=generator)
    if inputs and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids()
    return inputs


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    size = config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)


def _contexts(model: nn.Module) -> list[int]:
    values = [getattr(owner, name, None) for owner in (model, getattr(model, "config", None)) for name in _CONTEXT]
    return [value for value in values if isinstance(value, int) and value > 0]
