"""Steps that raise between the move and the way back, and steps inside steps: one teleport each, and no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast.symmetry import GeneralLinear


class Run:
    """Two linear layers with one GL joint between them."""

    def __init__(self, make: Callable[..., Optimizer]) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
        self.optimizer = make(self.model.parameters(), lr=1e-2)

    def attach(self, *args: Any, **options: Any) -> tf.Teleporter:
        plus = tf.View("0.weight", 0, 1, 4), tf.View("0.bias", 0, 1, 4)
        joint = tf.Joint("joint", "test", GeneralLinear(4), 1, 4, plus, (tf.View("1.weight", 1, 1, 4),))
        return tf.attach(self.optimizer, tf.Symmetries((joint,), model=self.model), *args, **options)

    def backward(self, step: int = 0) -> None:
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        self.model.zero_grad()
        self.model(x).square().mean().backward()

    def train(self, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            self.backward(step)
            self.optimizer.step()

    def interrupted_step(self) -> None:
        handle = self.optimizer.register_step_pre_hook(interrupt)
        with pytest.raises(Interrupted):
            self.optimizer.step()
        handle.remove()


class Interrupted(Exception):
    pass


def interrupt(*_: object) -> None:
    raise Interrupted


def assert_same_weights(one: Run, other: Run, tolerance: float = 1e-12) -> None:
    for here, there in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(here, there, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", ["grad_norm", "eigenbasis"])
@pytest.mark.parametrize("again", ["backward", "step only"])
def test_after_a_step_that_raised_the_return_frame_comes_back_all_the_same(objective: str, again: str) -> None:
    """The retry takes the step as if the other never was, from new gradients or from those that were moved."""
    run, undisturbed = Run(torch.optim.SGD), Run(torch.optim.SGD)
    for each in (run, undisturbed):
        each.attach(objective, tf.Every(1), frame="return")
        each.train(2)
    run.backward(2)
    run.interrupted_step()
    if again == "backward":
        run.backward(2)
    run.optimizer.step()
    undisturbed.train(1, first=2)
    assert_same_weights(run, undisturbed)


def test_a_step_that_raised_is_undone_by_detaching() -> None:
    run = Run(torch.optim.SGD)
    teleporter = run.attach("grad_norm", tf.Every(1), frame="return")
    run.train(2)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.backward(2)
    run.interrupted_step()
    assert not torch.allclose(run.model[0].weight, before[0], atol=1e-3)
    teleporter.detach()
    for parameter, weight in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-12)


def test_loading_a_checkpoint_after_a_step_that_raised_forgets_its_move() -> None:
    run = Run(torch.optim.SGD)
    teleporter = run.attach("grad_norm", tf.Every(1), frame="return")
    run.train(2)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    states = run.optimizer.state_dict(), teleporter.state_dict()
    run.backward(2)
    run.interrupted_step()
    run.model.load_state_dict(weights)
    run.optimizer.load_state_dict(states[0])
    teleporter.load_state_dict(states[1])
    undisturbed = Run(torch.optim.SGD)
    undisturbed.attach("grad_norm", tf.Every(1), frame="return")
    undisturbed.train(3)
    run.train(1, first=2)
    assert_same_weights(run, undisturbed)


def test_gradients_put_aside_by_a_step_that_raised_do_not_come_back_later() -> None:
    run = Run(torch.optim.AdamW)
    run.attach("grad_norm", tf.Once())
    run.backward()
    run.model[0].weight.grad[0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="not finite"):
        run.interrupted_step()
    run.train(2)
    for parameter in run.model.parameters():
        assert bool(parameter.isfinite().all())
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


class Overridden(torch.optim.AdamW):
    """An override that calls its base class's step, on which torch runs the hooks a second time."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("frame", ["stay", "return"])
def test_a_step_inside_a_step_teleports_once(frame: str) -> None:
    """Also after a step inside a step that raised, which leaves both unfinished."""
    Run(torch.optim.AdamW)  # torch hooks a class's step when its first object is made
    runs = Run(torch.optim.AdamW), Run(Overridden)
    for run in runs:
        teleporter = run.attach("grad_norm", tf.Every(2), frame=frame)
        run.train(5)
        assert teleporter.step_count == 5
        assert [record.step for record in teleporter.history] == [2, 4]
        run.interrupted_step()
        run.train(2, first=5)
        assert teleporter.step_count == 7
        assert [record.step for record in teleporter.history] == [2, 4, 6]
    assert_same_weights(*runs, tolerance=0)
