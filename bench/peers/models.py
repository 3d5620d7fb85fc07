"""The models that all arms step on: the demo's GPT, and the MLP of the papers, the only one that the published algorithm knows."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.symmetry.symmetries import Symmetries


@dataclass
class Workload:
    """A model with a fixed batch: `loss()` on it; the gradients are there once `backward` has run. `labels`: a classifier's."""

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters)

    @cached_property
    def symmetries(self) -> Symmetries:
        return tf.find_symmetries(self.model, self.inputs)

    def backward(self) -> Tensor:
        """Forward and backward of the batch; gradients are filled in place."""
        self.model.zero_grad(set_to_none=False)
        loss = self.loss()
        loss.backward()
        return loss.detach()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Weights and gradients afterwards are what they were; within, gradients have noise of a tenth of their size.

        Without it a covariance of the same few tokens' gradient has so many equal eigenvalues that LAPACK's eigh can fail (Shampoo).
        """
        weights = [p.detach().clone() for p in self.parameters]
        gradients = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        for p in self.parameters:
            if p.grad is not None:
                p.grad.add_(torch.randn_like(p.grad), alpha=0.1 * float(p.grad.square().mean().sqrt()))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, weight, gradient in zip(self.parameters, weights, gradients, strict=True):
                    p.copy_(weight)
                    p.grad = gradient


def gpt(config: GPTConfig, batch: int) -> Workload:
    """The demo's GPT with a head that is not zero, on random bytes."""
    torch.manual_seed(0)
    model = GPT(config)
    nn.init.normal_(model.head.weight, std=0.05)
    ids = torch.randint(config.vocab, (batch, config.context + 1))

    def loss() -> Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    return Workload(f"GPT, {batch} x {config.context} tokens", model, loss, (ids[:1, :-1],))


def mlp(widths: tuple[int, ...], batch: int) -> Workload:
    """LeakyReLU without biases in float64, as the papers' code has it."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {}
    for place, (before, after) in enumerate(itertools.pairwise(widths)):
        parts |= {f"layer{place}": nn.Linear(before, after, bias=False), f"activation{place}": nn.LeakyReLU(0.1)}
    parts.popitem()
    # what Muon leaves to AdamW goes by this name
    parts["head"] = parts.popitem()[1]
    model = nn.Sequential(OrderedDict(parts)).double()
    X, labels = torch.randn(batch, widths[0], dtype=torch.float64), torch.randint(widths[-1], (batch,))
    name = f"MLP {'-'.join(map(str, widths))}, batch {batch}, float64"
    return Workload(name, model, lambda: F.cross_entropy(model(X), labels), (X,), labels)
