"""A stack's seeds are the networks that they would be alone, with every optimizer and through teleports."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from teleport_fast.data_dependent import CrossEntropy, teleport_
from teleport_fast.experiments.stack import OPTIMIZERS, Stack

WIDTHS, SEEDS = (9, 8, 7, 4), (0, 3)


def alone(stack: Stack, seed: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight in stack.of(seed):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight.clone())
        layers += [linear, nn.LeakyReLU(stack.slope)]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(("name", "second"), [(name, "keep") for name in OPTIMIZERS] + [("Adam", "project")])
def test_a_stack_trains_and_carries_as_its_networks_do_alone(name: str, second: str) -> None:
    stack = Stack.uniform(WIDTHS, SEEDS, torch.float64)
    models = [alone(stack, seed) for seed in range(2)]
    optimizer = OPTIMIZERS[name](stack.weights, 0.01)
    optimizers = [OPTIMIZERS[name](list(model.parameters()), 0.01) for model in models]
    X, labels = torch.randn(9, 12, dtype=torch.float64), torch.arange(12) % 4
    few = slice(0, 6)
    for step in range(6):
        if step == 3:
            for seed, (model, own) in enumerate(zip(models, optimizers, strict=True)):
                loss = CrossEntropy(labels[few])
                stack.teleport_(seed, X[:, few], loss, optimizer, second_moments=second, steps=2, lr=0.1)
                teleport_(model, X[:, few].mT, loss, own, second_moments=second, steps=2, lr=0.1)
        optimizer.zero_grad()
        losses = stack.cross_entropy(X, labels)
        losses.sum().backward()
        optimizer.step()
        for seed, (model, own) in enumerate(zip(models, optimizers, strict=True)):
            own.zero_grad()
            loss_alone = nn.functional.cross_entropy(model(X.mT), labels)
            assert losses[seed].item() == pytest.approx(loss_alone.item(), rel=1e-8)
            loss_alone.backward()
            own.step()
    for seed, model in enumerate(models):
        for weight, layer in zip(stack.of(seed), model.parameters(), strict=True):
            assert torch.allclose(weight, layer, rtol=1e-7, atol=1e-10)
        assert stack.accuracy(X, labels)[seed] == (model(X.mT).argmax(1) == labels).double().mean()


def test_a_diverged_seed_leaves_the_others() -> None:
    stack = Stack.uniform(WIDTHS, SEEDS)
    whole = copy.deepcopy(stack.of(1))
    with torch.no_grad():
        stack.weights[0][0, 0, 0] = float("nan")
    X, labels = torch.randn(9, 12), torch.arange(12) % 4
    stack.cross_entropy(X, labels).sum().backward()
    assert not stack.finite(0) and stack.finite(1)
    assert all(torch.equal(new, old) for new, old in zip(stack.of(1), whole, strict=True))
    assert all(bool(torch.isfinite(weight.grad[1]).all()) for weight in stack.weights if weight.grad is not None)
