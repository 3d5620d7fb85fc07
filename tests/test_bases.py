"""What a teleporter can be put around: schedulefree's average moves with its weights; the rest is refused with a remedy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast.symmetry import GeneralLinear


def chain() -> tuple[nn.Sequential, tf.Symmetries]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).double()
    views = (tf.View("0.weight", 0, 1, 4),), (tf.View("1.weight", 1, 1, 4),)
    return model, tf.Symmetries((tf.Joint("joint", "test", GeneralLinear(4), 1, 4, *views),), model=model)


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    (model(x) - x.roll(1, 1)).square().mean().backward()


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedulefrees_average_keeps_its_function_at_a_teleport(kind: str) -> None:
    """The weights to evaluate are an average of the weights and `z`; with `z` left behind (the control) it is another."""
    schedulefree = pytest.importorskip("schedulefree")
    model, symmetries = chain()
    optimizer: Any = getattr(schedulefree, kind)(model.parameters(), lr=0.02)
    optimizer.train()
    teleporter = tf.attach(optimizer, symmetries, "grad_norm", tf.At(6), radius=0.5)
    seen: list[tuple[Tensor, Tensor]] = []
    z: list[Tensor] = []

    def evaluated(leave: bool = False) -> Tensor:
        twin, its = copy.deepcopy((model, optimizer))
        if leave:
            its.state[twin[0].weight]["z"].copy_(z[0])
        its.eval()
        found: Tensor = twin(torch.eye(4, dtype=torch.float64)).detach()
        return found

    def before(_: object) -> None:
        z.append(optimizer.state[model[0].weight]["z"].clone())
        seen.append((evaluated(), evaluated()))

    teleporter.before_move.append(before)
    teleporter.after_move.append(lambda _: seen.append((evaluated(), evaluated(leave=True))))
    for step in range(8):
        backward(model, step)
        optimizer.step()
    (start, _), (end, wrong) = seen
    assert float((end - start).norm() / start.norm()) < 1e-12
    assert float((wrong - start).norm() / start.norm()) > 1e-3


class Wrapper(Optimizer):
    """An Optimizer by name only, as accelerate's: it never called Optimizer.__init__."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


class Masters(torch.optim.AdamW):
    """Steps float32 copies of half-precision weights, as apex's fused Adam with master_weights=True."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.param_groups_master: list[Any] | None = [[torch.zeros(4, 4)]]


def test_what_cannot_be_teleported_is_refused_with_the_remedy() -> None:
    model, symmetries = chain()
    wrong: list[tuple[Any, str]] = [
        (Wrapper(torch.optim.AdamW(model.parameters())), "Wrapper has no step hooks; attach to the optimizer that it wraps"),
        (Masters(model.parameters()), "Masters keeps the weights that it steps in 'param_groups_master', outside its state"),
        (tf.optim.Rotated(model.named_parameters()), "Rotated turns to bases of its own within its step; step it as it is"),
        (torch.optim.LBFGS(model.parameters()), "LBFGS evaluates its closure several times a step"),
    ]
    for optimizer, message in wrong:
        with pytest.raises(TypeError, match=message):
            tf.attach(optimizer, symmetries)
    without = Masters(model.parameters())
    without.param_groups_master = None
    assert tf.attach(without, symmetries).step_count == 0


def test_schedulefrees_closure_variants_are_refused() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model, symmetries = chain()
    with pytest.raises(TypeError, match="moves the weights before it evaluates its closure; use AdamWScheduleFree"):
        tf.attach(schedulefree.AdamWScheduleFreeClosure(model.parameters()), symmetries)


def test_state_hooks_of_a_teleport_are_the_bases() -> None:
    model, symmetries = chain()
    base = torch.optim.AdamW(model.parameters())
    optimizer, calls = tf.Teleport(base, symmetries, "balance"), list[str]()
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    base.state_dict()
    assert calls == ["saved", "loaded", "saved"]
