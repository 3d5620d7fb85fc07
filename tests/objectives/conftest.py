"""Tiny GPTs off their initialisation, one per kind of architecture, with their joints and a stream of batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "relu2": {},
    "swiglu-rotary-grouped": {"mlp": "swiglu", "positions": "rotary", "kv_heads": 1},
    "layernorm": {"norm": "layer", "mlp": "relu"},
    "fused-qkv-bias": {"fused_qkv": True, "bias": True, "mlp": "gelu"},
    "rotary-fused-tied": {"positions": "rotary", "fused_qkv": True, "tied": True},
    "gains-layernorm-bias": {"gains": True, "norm": "layer", "bias": True},
    "folded": {"gains": True, "folded": True},
    "folded-layernorm-bias": {"gains": True, "norm": "layer", "bias": True, "folded": True},
}


@dataclass
class Trial:
    """A model, its joints, and batches by number."""

    model: GPT
    symmetries: tf.Symmetries
    optimizer: Optimizer | None = None

    def batch(self, step: int) -> Tensor:
        return torch.randint(13, (4, 8), generator=torch.Generator().manual_seed(step))

    def backward(self, step: int) -> float:
        """The loss of batch `step`, its gradients in `.grad`."""
        self.model.zero_grad()
        ids = self.batch(step)
        loss = F.cross_entropy(self.model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.item()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model(self.batch(1000))

    def sgd(self, lr: float = 0.0, **options: Any) -> torch.optim.SGD:
        return torch.optim.SGD(self.model.named_parameters(), lr=lr, **options)

    def adamw(self, lr: float = 3e-3) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.model.named_parameters(), lr=lr)

    @contextmanager
    def deviations(self, teleporter: tf.Teleporter) -> Iterator[list[float]]:
        """Collects ‖change of the logits‖/‖logits‖ of every move made inside."""
        before: list[Tensor] = []
        changes: list[float] = []

        def measure(record: tf.TeleportRecord) -> None:
            logits = before.pop()
            changes.append(float((self.logits() - logits).norm() / logits.norm()))

        teleporter.before_move.append(lambda _: before.append(self.logits()))
        teleporter.after_move.append(measure)
        yield changes


def make_trial(dtype: torch.dtype = torch.float64, folded: bool = False, **changes: Any) -> Trial:
    generator = torch.Generator().manual_seed(1)
    model = GPT(GPTConfig(vocab=13, context=8, d_model=16, layers=2, heads=2, hidden=24, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    if folded:
        tf.fold_norm_gains_(model)
    return Trial(model, tf.find_symmetries(model))


@pytest.fixture(scope="session")
def found() -> dict[str, Trial]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {name: make_trial(**changes) for name, changes in VARIANTS.items()}


@pytest.fixture
def trial_of(found: dict[str, Trial]) -> Callable[..., Trial]:
    """A fresh copy of a variant, in float64 or in another dtype."""

    def make(name: str = "relu2", dtype: torch.dtype = torch.float64) -> Trial:
        return Trial(copy.deepcopy(found[name].model).to(dtype), found[name].symmetries)

    return make


@pytest.fixture(params=VARIANTS)
def trial(request: pytest.FixtureRequest, trial_of: Callable[..., Trial]) -> Trial:
    """A fresh float64 copy of every variant in turn."""
    return trial_of(request.param)


@pytest.fixture(autouse=True)
def one_thread(same_seed_and_settings: None) -> None:
    """These models are too small for two threads, which only wait for each other."""
    torch.set_num_threads(1)
