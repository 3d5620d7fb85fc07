"""A Sequential as a list of weights and back: one activation throughout, and biases only where there are some."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from teleport_fast.data_dependent import MLPAction, leaky_relu
from teleport_fast.data_dependent.sequential import read_sequential, write_sequential


def chain(between: nn.Module, bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    return nn.Sequential(nn.Linear(5, 4), between, nn.Linear(4, 2, bias=bias)).double(), torch.randn(3, 5, dtype=torch.float64)


def test_a_prelu_is_the_leaky_relu_of_its_one_slope() -> None:
    model, x = chain(nn.PReLU(init=0.3))
    action = MLPAction.from_sequential(model, x)
    assert action.activation is leaky_relu(float(model[1].weight.detach()))
    assert torch.allclose(action.outputs().mT, model(x))
    with pytest.raises(ValueError, match=r"PReLU must have one slope, got 4; pass PReLU\(1\)"):
        MLPAction.from_sequential(*chain(nn.PReLU(4)))


def test_a_sequential_of_another_build_is_refused() -> None:
    linear, x = nn.Linear(3, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"must alternate Linear and activation and end in Linear, got \['Linear', 'LeakyReLU'\]"):
        MLPAction.from_sequential(nn.Sequential(linear, nn.LeakyReLU(0.1)), x)
    slopes = [nn.LeakyReLU(slope) for slope in (0.1, 0.2)]
    with pytest.raises(ValueError, match=r"one activation throughout, got \['leaky_relu\(0.1\)', 'leaky_relu\(0.2\)'\]"):
        MLPAction.from_sequential(nn.Sequential(linear, slopes[0], linear, slopes[1], linear), x)


def test_a_move_that_needs_a_bias_where_there_is_none_is_refused() -> None:
    model, x = chain(nn.LeakyReLU(0.1), bias=False)
    weights, _, bias = read_sequential(model)
    assert bias and weights[1].shape == (2, 5) and not weights[1][:, -1].any()  # zeros stand for the bias that it lacks
    before = model(x)
    write_sequential(model, weights)
    assert torch.equal(model(x), before)
    weights[1][:, -1] = 1
    with pytest.raises(ValueError, match="a Linear without bias must stay so, but the move gives it one; build it with bias=True"):
        write_sequential(model, weights)
