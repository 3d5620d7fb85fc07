"""A scale per joint is a ratio of learning rates: AdamW and a ratio are LoRA+, whose groups have rates, eps and decay of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast import objectives

X, Y = (torch.randn(12, n, generator=torch.Generator().manual_seed(n)).double() for n in (7, 5))


def pair(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """An adapter as LoRA begins it, B = 0, and its bare layer: 0.weight is A, 1.weight is B."""
    model = nn.Sequential(nn.Linear(7, 3, bias=False), nn.Linear(3, 5, bias=False)).to(dtype)
    nn.init.zeros_(model[1].weight)
    return model


def joints(model: nn.Module) -> tf.Symmetries:
    return tf.find_symmetries(model).select(lambda joint: joint.group.holds_stretches and joint.group.form == "dense")


def train(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> Tensor:
    for step in range(first, first + steps):
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(step))[:6]
        loss = (model(X[rows].to(model[0].weight.dtype)) - Y[rows].to(model[0].weight.dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lora_plus(model: nn.Module, rate: float, ratio: float, eps: float, decay: float) -> torch.optim.AdamW:
    """LoRA+ as published: B's rate is `ratio` times A's; eps and decay as a scale of √ratio makes them."""
    s, (a, b) = ratio**0.5, model.parameters()
    groups = [
        {"params": [a], "lr": rate / s, "eps": s * eps, "weight_decay": s * decay},
        {"params": [b], "lr": rate * s, "eps": eps / s, "weight_decay": decay / s},
    ]
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_with_a_ratio_is_lora_plus_bit_for_bit(decay: float) -> None:
    """In float32: √16 and √64 are powers of two, so that scaling rounds nothing."""
    for ratio in (16.0, 64.0):
        start = pair(torch.float32)
        plain, teleported, wrong = (copy.deepcopy(start) for _ in range(3))
        # powers of two throughout: lr, lr/s and s·lr, like eps and decay, are then the same number after any order of products
        wanted = train(plain, lora_plus(plain, 2.0**-7, ratio, 2.0**-27, decay), 30)
        optimizer = torch.optim.AdamW(teleported.parameters(), lr=2.0**-7, eps=2.0**-27, weight_decay=decay)
        tf.attach(optimizer, joints(teleported), objectives.Ratio(ratio), frame="return")
        assert torch.equal(train(teleported, optimizer, 30), wanted)
        optimizer = torch.optim.AdamW(wrong.parameters(), lr=2.0**-7, eps=2.0**-27, weight_decay=decay)
        tf.attach(optimizer, joints(wrong), objectives.Ratio(4 * ratio), frame="return")
        assert not torch.allclose(train(wrong, optimizer, 30), wanted, rtol=1e-2)


@pytest.mark.parametrize("ratio", [0.3, 7.0])
def test_any_ratio_is_lora_plus_in_float64(ratio: float) -> None:
    start = pair()
    plain, teleported = copy.deepcopy(start), copy.deepcopy(start)
    wanted = train(plain, lora_plus(plain, 0.01, ratio, 1e-8, 0.1), 30)
    optimizer = torch.optim.AdamW(teleported.parameters(), lr=0.01, eps=1e-8, weight_decay=0.1)
    tf.attach(optimizer, joints(teleported), objectives.Ratio(ratio), frame="return")
    torch.testing.assert_close(train(teleported, optimizer, 30), wanted, rtol=1e-10, atol=1e-12)


BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5),
}


@pytest.mark.parametrize("base", BASES)
def test_both_frames_take_the_same_steps_and_only_one_keeps_the_rescaled_weights(base: str) -> None:
    start = pair()
    ends = {}
    for frame in ("stay", "return"):
        model = copy.deepcopy(start)
        optimizer = BASES[base](model.parameters())
        teleporter = tf.attach(optimizer, joints(model), objectives.Ratio(9.0), frame=frame)
        train(model, optimizer, 20)
        ends[frame] = [p.detach() for p in model.parameters()]
        assert [record.step for record in teleporter.history] == [0]
    for stayed, returned, factor in zip(ends["stay"], ends["return"], (3.0, 1 / 3), strict=True):
        torch.testing.assert_close(stayed, factor * returned, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(stayed, returned, rtol=1e-2)


def test_a_resumed_run_neither_scales_again_nor_forgets() -> None:
    start = pair()
    whole, first = copy.deepcopy(start), copy.deepcopy(start)
    ends = []
    for model, cut in ((whole, None), (first, 6)):
        optimizer = BASES["adamw"](model.parameters())
        teleporter = tf.attach(optimizer, joints(model), "ratio", tf.Every(5), frame="return")
        train(model, optimizer, cut or 12)
        if cut:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), teleporter.state_dict()))
            model = copy.deepcopy(start)
            optimizer = BASES["adamw"](model.parameters())
            teleporter = tf.attach(optimizer, joints(model), "ratio", tf.Every(5), frame="return")
            for part, state in zip((model, optimizer, teleporter), saved, strict=True):
                part.load_state_dict(state)
            train(model, optimizer, 12 - cut, first=cut)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_joints_that_hold_no_scale_are_left_out() -> None:
    view = tf.View("w", 0, 1, 4)
    turning = tf.Joint("turning", "test", tf.symmetry.Orthogonal(4), 1, 4, (view,), (view,))
    assert objectives.Ratio().unusable(turning) == "O(4) holds no scale"
