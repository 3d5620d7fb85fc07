"""A training process that is killed: resumed from its last checkpoint it ends, bit by bit, where an undisturbed one ends."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import teleport_fast as tf
from teleport_fast.symmetry import Diagonal, GeneralLinear

STEPS, EVERY = 30, 3
pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="kills a forked process, on Linux only")


def joint(i: int, group: tf.symmetry.Group) -> tf.Joint:
    return tf.Joint(f"{i}", f"{i}", group, 1, 4, (tf.View(f"{i}.weight", 0, 1, 4),), (tf.View(f"{i + 1}.weight", 1, 1, 4),))


def train(checkpoint: Path, objective: str, frame: str, pause: float = 0.0, stop: int = STEPS) -> nn.Module:
    """Up to STEPS steps from the checkpoint, if there is one; every EVERY steps a new one takes its place at once."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    symmetries = tf.Symmetries((joint(0, GeneralLinear(4)), joint(2, Diagonal(4))), model=model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    teleporter = tf.attach(optimizer, symmetries, objective, tf.Every(2), frame=frame)
    first = 0
    if checkpoint.exists():
        saved: Any = torch.load(checkpoint, weights_only=True)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        teleporter.load_state_dict(saved["teleporter"])
    for step in range(first, stop):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        time.sleep(pause)
        if (step + 1) % EVERY == 0:
            part = checkpoint.with_suffix(".part")
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "teleporter": teleporter.state_dict()}
            torch.save({"step": step + 1, **states}, part)
            part.replace(checkpoint)
    return model


@pytest.mark.parametrize(("objective", "frame"), [("grad_norm", "stay"), ("eigenbasis", "return")])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_bits(objective: str, frame: str, number: int, tmp_path: Path) -> None:
    undisturbed = train(tmp_path / "undisturbed.pt", objective, frame)
    checkpoint, chance, killed = tmp_path / "killed.pt", random.Random(int(number)), 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(checkpoint, objective, frame, pause=0.002)
                code = 0
            finally:
                os._exit(code)
        if killed < 4:
            time.sleep(chance.uniform(0.01, 0.05))
            os.kill(child, number)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        assert os.WEXITSTATUS(status) == 0
        break
    assert killed > 0
    end = torch.load(checkpoint, weights_only=True)
    assert end["step"] == STEPS
    for name, weight in undisturbed.state_dict().items():
        assert torch.equal(end["model"][name], weight)


def test_a_run_that_resumes_without_the_teleporters_state_ends_elsewhere(tmp_path: Path) -> None:
    """The control: the comparison sees a basis that is forgotten."""
    half = tmp_path / "half.pt"
    train(half, "eigenbasis", "return", stop=STEPS // 2)
    saved = torch.load(half, weights_only=True)
    assert saved["step"] == STEPS // 2
    ends = []
    for teleporter in (saved["teleporter"], {"objective": {}, "held": {}}):
        torch.save({**saved, "teleporter": teleporter}, half)
        ends.append(train(half, "eigenbasis", "return"))
    undisturbed = train(tmp_path / "undisturbed.pt", "eigenbasis", "return").state_dict()
    same = [all(torch.equal(end.state_dict()[name], weight) for name, weight in undisturbed.items()) for end in ends]
    assert same == [True, False]
