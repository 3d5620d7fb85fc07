"""torch.compile of the model and of the step: the schedule decides eagerly, and after warm-up nothing is compiled again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import teleport_fast as tf
from teleport_fast.symmetry import GeneralLinear, Orthogonal


def run(compiled: str, frame: str, objective: str, steps: int = 9) -> tuple[nn.Module, Any, list[int], list[int], int]:
    """The model, its optimizer, frames compiled so far after each step, steps that teleported, and steps counted."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).double()
    group = Orthogonal(4) if objective == "eigenbasis" else GeneralLinear(4)
    joint = tf.Joint("j", "test", group, 1, 4, (tf.View("0.weight", 0, 1, 4),), (tf.View("1.weight", 1, 1, 4),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), foreach=False)
    teleporter = tf.attach(optimizer, tf.Symmetries((joint,), model=model), objective, tf.Every(3), frame=frame)
    counter = CompileCounter()
    forward: Any = torch.compile(model, backend=counter) if compiled == "model" else model
    step: Any = torch.compile(optimizer.step, backend=counter) if compiled == "step" else optimizer.step
    counts = []
    for number in range(steps):
        optimizer.zero_grad()
        forward(torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        step()
        counts.append(int(counter.frame_count))
    torch.compiler.reset()
    return model, optimizer, counts, [record.step for record in teleporter.history], teleporter.step_count


@pytest.mark.parametrize("objective, frame", [("eigenbasis", "return")])
@pytest.mark.parametrize("compiled", ["model", "step"])
def test_nothing_is_compiled_again_after_warm_up_and_the_run_is_the_same(
    compiled: str, objective: str, frame: str
) -> None:
    plain, _, none, *what = run("nothing", frame, objective)
    model, _, counts, *same = run(compiled, frame, objective)
    assert none[-1] == 0
    assert counts[0] >= 1
    assert counts[1] == counts[-1], f"frames compiled by step: {counts}"
    assert what == same == [[3, 6], 9]
    # a compiled AdamW computes its bias corrections from a float32 step count
    tolerance = 1e-12 if compiled == "model" else 1e-4
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance / 10)


class Two(nn.Module):
    """A forward of its own: of torch's Sequential, compiled in place, nothing is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_symmetries_of_a_compiled_model_are_found_and_proven_without_compiling(how: str) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    plain: Any = Two()
    expected = tf.find_symmetries(plain)
    if how == "wrapped":
        model: Any = torch.compile(plain, backend=counter)
    else:
        plain.compile(backend=counter)
        model = plain
    found = tf.find_symmetries(model)
    assert [joint.kind for joint in found] == [joint.kind for joint in expected] and len(found) >= 2
    assert found.verify(model).ok
    assert counter.frame_count == 0
    model(torch.randn(2, 4))
    assert counter.frame_count >= 1, "the control: called by itself it does compile"
    teleporter = tf.attach(torch.optim.SGD(model.parameters()), found, "balance")
    assert teleporter.plan.buckets
    torch.compiler.reset()
