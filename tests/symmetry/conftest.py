"""Tiny GPTs in float64, one per variant that matters to a symmetry, with what was found on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teleport_fast import Symmetries, find_symmetries, fold_norm_gains_
from teleport_fast.experiments.gpt import GPT, GPTConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "relu2": {},
    "relu-layernorm-bias": {"mlp": "relu", "norm": "layer", "bias": True},
    "gelu-fused-bias": {"mlp": "gelu", "fused_qkv": True, "bias": True},
    "swiglu-grouped": {"mlp": "swiglu", "kv_heads": 2},
    "rotary-bias": {"positions": "rotary", "bias": True},
    "rotary-fused-multiquery": {"positions": "rotary", "fused_qkv": True, "kv_heads": 1},
    "rotary-swiglu-tied": {"positions": "rotary", "mlp": "swiglu", "kv_heads": 2, "bias": True, "tied": True},
    "tied-layernorm": {"tied": True, "norm": "layer"},
    "tied-gains": {"tied": True, "gains": True, "mlp": "relu"},
    "gains": {"gains": True},
    "gains-layernorm-bias": {"gains": True, "norm": "layer", "bias": True},
    "folded": {"gains": True, "folded": True},
    "folded-layernorm-bias": {"gains": True, "norm": "layer", "bias": True, "folded": True},
}


@dataclass
class Trial:
    """A model off its initialisation, its joints, and a batch."""

    model: GPT
    symmetries: Symmetries
    ids: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model(self.ids)

    def gradients(self) -> dict[str, Tensor]:
        """Autograd's gradient of the next-token loss, by parameter name; frozen parameters have none."""
        loss = F.cross_entropy(self.model(self.ids)[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
        trained = {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def make_trial(folded: bool = False, **changes: Any) -> Trial:
    generator = torch.Generator().manual_seed(1)
    config = GPTConfig(vocab=13, context=8, d_model=16, layers=2, heads=4, hidden=12, **changes)
    model = GPT(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if folded:
        fold_norm_gains_(model)
    return Trial(model, find_symmetries(model), torch.randint(13, (3, 8), generator=generator))


@pytest.fixture(scope="session", params=VARIANTS.values(), ids=VARIANTS.keys())
def found(request: pytest.FixtureRequest) -> Trial:
    return make_trial(**request.param)


@pytest.fixture
def trial(found: Trial) -> Trial:
    """A fresh copy of every variant in turn."""
    return Trial(copy.deepcopy(found.model), found.symmetries, found.ids)


@pytest.fixture(scope="session")
def trial_of() -> Callable[..., Trial]:
    """Makes one named variant: `trial_of("relu2")`, or any other configuration: `trial_of(mlp="relu")`."""

    def make(name: str | None = None, **changes: Any) -> Trial:
        return make_trial(**(VARIANTS[name] if name else {}), **changes)

    return make


@pytest.fixture(autouse=True)
def one_thread(same_seed_and_settings: None) -> None:
    """These models are too small for two threads, which only wait for each other."""
    torch.set_num_threads(1)
