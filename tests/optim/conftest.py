"""A small GPT in float64 with its symmetries, a loss that depends on the step alone, and a short training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig

Loss = Callable[[nn.Module, int], Tensor]


@pytest.fixture(scope="session")
def found() -> tuple[GPT, tf.Symmetries]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=13, context=6, d_model=8, layers=2, heads=2, hidden=12)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model, tf.find_symmetries(model)


@pytest.fixture
def gpt(found: tuple[GPT, tf.Symmetries]) -> GPT:
    torch.set_num_threads(1)
    return copy.deepcopy(found[0])


@pytest.fixture
def symmetries(found: tuple[GPT, tf.Symmetries]) -> tf.Symmetries:
    return found[1]


@pytest.fixture
def loss_of() -> Loss:
    def loss(model: nn.Module, step: int) -> Tensor:
        ids = torch.randint(13, (3, 6), generator=torch.Generator().manual_seed(step))
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return loss


@pytest.fixture
def train(loss_of: Loss) -> Callable[..., None]:
    def run(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    return run


@pytest.fixture
def same() -> Callable[[nn.Module, nn.Module], bool]:
    return lambda one, other: all(map(torch.equal, one.parameters(), other.parameters()))
