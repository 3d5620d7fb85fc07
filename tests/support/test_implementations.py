"""Rows of the support matrix: the base's own ways to step (for-loop, foreach, fused, capturable, tensor lr), and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import teleport_fast as tf
from teleport_fast.experiments.memory import peak
from teleport_fast.symmetry import Diagonal, GeneralLinear

FLAGS = {
    "SGD": {"foreach", "fused", "tensor lr"},
    "Adam": {"foreach", "fused", "capturable", "tensor lr"},
    "AdamW": {"foreach", "fused", "capturable", "tensor lr"},
    "Adagrad": {"foreach", "fused", "tensor lr"},
    "RMSprop": {"foreach", "capturable", "tensor lr"},
    "Muon": {"tensor lr"},
    "schedulefree": {"foreach", "tensor lr"},
    "AdamW(fused=True)": {"fused", "capturable", "tensor lr"},
    "tf.optim.AdamW": {"tensor lr"},
    "tf.optim.Rotated": {"tensor lr"},
}


def against_the_for_loop(arm: Any, flag: str) -> None:
    if flag not in FLAGS[arm.name]:
        if arm.name == "AdamW(fused=True)":
            with arm.refuses(RuntimeError, "`fused` and `foreach` cannot be `True` together", "by torch, beside fused"):
                arm.run(**{flag: True})
            return
        with arm.refuses(TypeError, f"unexpected keyword argument '{flag}'", "it has no such argument"):
            arm.run(**{flag: True})
        return
    options = {"foreach": False} if arm.name not in ("AdamW(fused=True)",) else {"foreach": False, "fused": False}
    fast, loop = arm.run(**{"foreach": False, flag: True} if flag != "foreach" else {flag: True}), arm.run(**options)
    for run in (fast, loop):
        run.train(7)
        assert run.teleports == [2, 4, 6]
    for one, two in zip(fast.everything().values(), loop.everything().values(), strict=True):
        torch.testing.assert_close(one, two.to(one.dtype), rtol=1e-9, atol=1e-11)


@pytest.mark.support("foreach against the for-loop")
def test_foreach_is_the_for_loop(arm: Any) -> None:
    against_the_for_loop(arm, "foreach")


@pytest.mark.support("fused against the for-loop")
def test_fused_is_the_for_loop(arm: Any) -> None:
    against_the_for_loop(arm, "fused")


@pytest.mark.support("capturable")
def test_capturable_is_for_devices_that_capture(arm: Any) -> None:
    if "capturable" not in FLAGS[arm.name]:
        with arm.refuses(TypeError, "unexpected keyword argument 'capturable'", "it has no such argument"):
            arm.run(capturable=True)
        return
    if arm.name == "AdamW(fused=True)":
        run, other = arm.run(capturable=True).train(5), arm.run().train(5)
        assert all(map(torch.equal, run.weights(), other.weights()))
        return
    run = arm.run(capturable=True, foreach=False)
    run.backward(0)
    with arm.refuses((AssertionError, RuntimeError), "capturable=True", "by torch on a CPU; not run on a GPU yet"):
        run.optimizer.step()


@pytest.mark.support("lr as a tensor")
def test_a_rate_in_a_tensor_is_the_same_rate(arm: Any) -> None:
    rate = arm.options["lr"]
    changes = {"foreach": False} if arm.name in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "schedulefree") else {}
    run, other = arm.run(lr=torch.tensor(rate, dtype=torch.float64), **changes), arm.run(**changes)
    for each in (run, other):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(each.optimizer, 0.9)
        for step in range(6):
            each.train(1, first=step)
            scheduler.step()
    for one, two in zip(run.weights(), other.weights(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9 if arm.name != "Muon" else 1e-6, atol=1e-9)
    assert run.engine is None or run.teleports == other.teleports == [2, 4]


@pytest.mark.support("peak memory of a step: the base's and 2% of the parameters")
@pytest.mark.parametrize("due", [False, True])
def test_a_step_takes_no_memory_that_the_base_does_not_take(arm: Any, due: bool) -> None:
    """Joints of width 8 between layers of 512, as heads are narrow beside the model, and more matrices than move.

    A move may hold one moved tensor twice while it is at it, whatever the size of the model.
    """
    torch.manual_seed(0)
    peaks, size = {}, 0
    for plain in (True, False):
        model = nn.Sequential(*(nn.Linear(*((512, 8) if i % 2 == 0 else (8, 512)), bias=False) for i in range(4)))
        others = [("others", nn.Parameter(torch.randn((500 if due and arm.teleports else 1) * 512, 8)))]
        params = [*model.named_parameters(), *others]
        size = sum(4 * parameter.numel() for _, parameter in params)
        views = [(tf.View(f"{i}.weight", 0, 1, 8), tf.View(f"{i + 1}.weight", 1, 1, 8)) for i in (0, 2)]
        groups = GeneralLinear(8), Diagonal(8)
        joints = tuple(
            tf.Joint(f"{i}", "test", group, 1, 8, (plus,), (minus,))
            for i, (group, (plus, minus)) in enumerate(zip(groups, views, strict=True))
        )
        run = arm.run(
            model=model, params=params, symmetries=tf.Symmetries(joints, model=model), plain=plain,
            **({"schedule": tf.Every(2 if due else 100)} if arm.teleports else {}),
        )  # fmt: skip
        for step in range(3):
            run.optimizer.zero_grad()
            (model(torch.randn(4, 512)).square().mean() + others[0][1].square().mean()).backward()
            if step < 2:
                run.optimizer.step()
        peaks[plain] = peak(run.optimizer.step)
        assert run.engine is None or run.teleports == ([2] if due else [])
    assert peaks[False] <= peaks[True] + 0.02 * size
