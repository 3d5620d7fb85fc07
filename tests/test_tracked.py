"""Averages and reference copies move with the weights; left behind, they average points of one orbit to nonsense."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import teleport_fast as tf
from teleport_fast.symmetry import Diagonal, GeneralLinear


def mlp() -> tuple[nn.Sequential, tf.Symmetries]:
    """Linear, BatchNorm, ReLU, linear, linear: two diagonals, one of which carries running statistics, and a GL joint."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
    ).double()
    scale = tf.View("1.weight", 0, 1, 4), tf.View("1.bias", 0, 1, 4)
    rows = tf.View("0.weight", 0, 1, 4), tf.View("0.bias", 0, 1, 4)
    statistics = tf.View("1.running_mean", 0, 1, 4), tf.View("1.running_var", 0, 1, 4, power=2.0, shift=1e-5)
    scaled = tf.Joint("scaled", "test", Diagonal(4), 1, 4, rows, (), statistics)
    first = tf.Joint("first", "test", Diagonal(4), 1, 4, scale, (tf.View("3.weight", 1, 1, 4),))
    second = tf.Joint(
        "second", "test", GeneralLinear(4), 1, 4, (tf.View("3.weight", 0, 1, 4),), (tf.View("4.weight", 1, 1, 4),)
    )
    return model, tf.Symmetries((scaled, first, second), model=model)


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    found = model(torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))).detach()
    model.train()
    return found


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


AVERAGES: dict[str, Any] = {
    "SWA": lambda model: AveragedModel(model),
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("tracked", [True, False])
def test_an_average_is_that_of_the_run_without_teleports(average: str, tracked: bool) -> None:
    """SGD with rate 0: all points are of one function, and so must their average be; untracked (the control) it is not."""
    model, symmetries = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    teleporter = tf.attach(optimizer, symmetries, "grad_norm", tf.Every(2), radius=0.5)
    averaged = AVERAGES[average](model)
    if tracked:
        teleporter.track(averaged)
    for step in range(8):
        backward(model, step)
        optimizer.step()
        averaged.update_parameters(model)
    averaged.module.load_state_dict({**averaged.module.state_dict(), **dict(model.named_buffers())})
    assert len(teleporter.history) == 3
    deviation = float((outputs(averaged) - outputs(model)).norm() / outputs(model).norm())
    assert deviation < 1e-12 if tracked else deviation > 1e-2


@pytest.mark.parametrize("kind", ["module", "mapping", "half"])
def test_a_copy_keeps_its_function_through_a_move_until_it_is_let_go(kind: str) -> None:
    model, symmetries = mlp()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if kind == "half":
        other.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    teleporter = tf.attach(optimizer, symmetries, "grad_norm", tf.Every(1), radius=0.5)
    named = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    handle = teleporter.track(named if kind == "mapping" else other)
    before = outputs(copy.deepcopy(other).double())
    start = other[4].weight.detach().clone()
    for step in range(2):
        backward(model, step)
        optimizer.step()
    assert float((other[4].weight.detach() - start).norm()) > 1e-2
    torch.testing.assert_close(outputs(copy.deepcopy(other).double()), before, rtol=1e-4 if kind == "half" else 1e-12, atol=1e-5)
    handle.remove()
    start = other[4].weight.detach().clone()
    backward(model, 2)
    optimizer.step()
    assert torch.equal(other[4].weight, start)


def test_in_the_return_frame_a_copy_stays_where_it_is() -> None:
    model, symmetries = mlp()
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tf.attach(optimizer, symmetries, "grad_norm", tf.Every(1), frame="return").track(other)
    start = [parameter.detach().clone() for parameter in other.parameters()]
    for step in range(2):
        backward(model, step)
        optimizer.step()
    assert all(map(torch.equal, other.parameters(), start))


def test_moves_that_adamw_takes_within_its_step_reach_the_copy_too() -> None:
    model, symmetries = mlp()
    other = copy.deepcopy(model)
    optimizer = tf.optim.AdamW(
        model.named_parameters(), lr=0.0, symmetries=symmetries.select(["first"]), schedule=tf.Every(1), radius=0.5
    )
    assert optimizer.teleporter is not None
    optimizer.teleporter.track(other)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    start = mlp()[0]
    assert not torch.allclose(model[1].weight, start[1].weight)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_copy_is_not_kept_alive_and_one_that_does_not_fit_is_named() -> None:
    model, symmetries = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    teleporter = tf.attach(optimizer, symmetries, "grad_norm", tf.Every(1))
    other = copy.deepcopy(model)
    teleporter.track(other)
    del other
    gc.collect()
    for step in range(2):
        backward(model, step)
        optimizer.step()
    assert not teleporter._tracked._copies
    with pytest.raises(ValueError, match=r"copy has no tensor '0\.weight', which joint 'scaled' moves; pass the averaged"):
        teleporter.track(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"joint 'first'.*'3\.weight'"):
        teleporter.track({**dict(model.named_parameters()), **dict(model.named_buffers()), "3.weight": torch.zeros(2, 2)})
