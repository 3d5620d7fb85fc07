"""accelerate: prepared before or after attach, accumulated, saved and resumed; one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import teleport_fast as tf
from teleport_fast.integrations.accelerate import attach
from teleport_fast.integrations.attached import innermost

accelerate = pytest.importorskip("accelerate", reason="needs accelerate; pip install -r requirements/dev.txt")

Fresh = Callable[[], tuple[Any, tf.Symmetries]]
Watch = Callable[[tf.Teleporter, Any], list[float]]
ENGINE: dict[str, Any] = {"objective": "grad_norm", "schedule": tf.Every(2), "radius": 0.2}


class Run:
    """A loop as accelerate's documentation has it, with the attach at one of three places."""

    def __init__(self, fresh: Fresh, when: str, accumulate: int = 1, folder: Path | None = None, **engine: Any) -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        self.model, symmetries = fresh()
        self.accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulate, cpu=True, project_dir=folder)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.teleporter: Any = None
        if when == "before":
            self.teleporter = attach(self.accelerator, optimizer, symmetries, **{**ENGINE, **engine})
        elif when == "before, plain attach":
            self.teleporter = tf.attach(optimizer, symmetries, **{**ENGINE, **engine})
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(self.model, optimizer, scheduler)
        if when == "after":
            self.teleporter = attach(self.accelerator, self.optimizer, symmetries, **{**ENGINE, **engine})
        self.seen: list[float] = []

    def train(self, data: Any, batches: range) -> None:
        for number in batches:
            with self.accelerator.accumulate(self.model):
                rows = data[2 * number : 2 * number + 2]
                batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
                self.accelerator.backward(self.model(**batch).loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.seen.append(innermost(self.optimizer).param_groups[0]["lr"])
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def test_before_prepare_after_it_and_plain_attach_are_one_run(fresh: Fresh, data: Any, watch: Watch) -> None:
    """Two batches a step: teleports, counter and rates go by real steps. Without a teleporter (the control) it is another."""
    ends = []
    for when in ("before", "after", "before, plain attach", "never"):
        run = Run(fresh, when, accumulate=2)
        moved = [] if run.teleporter is None else watch(run.teleporter, run.accelerator.unwrap_model(run.model))
        run.train(data, range(14))
        assert run.seen == pytest.approx([1e-2 * 0.9**i for i in range(7)])
        if run.teleporter is not None:
            assert [record.step for record in run.teleporter.history] == [2, 4, 6]
            assert run.teleporter.step_count == 7
            assert len(moved) == 3 and max(moved) < 1e-6
        ends.append(run.weights())
    assert [all(map(torch.equal, ends[0], other)) for other in ends[1:]] == [True, True, False]


@pytest.mark.parametrize("when", ["before", "after", "before, plain attach"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(fresh: Fresh, data: Any, tmp_path: Path, when: str) -> None:
    """Plain attach (the control) has the counter in the optimizer's state, and not the eigenbasis' memory."""
    engine = {"objective": "eigenbasis", "schedule": tf.Every(3)}
    run = Run(fresh, when, folder=tmp_path, **engine)
    run.train(data, range(4))
    run.accelerator.save_state(str(tmp_path / "state"))
    run.train(data, range(4, 9))
    second = Run(fresh, when, folder=tmp_path, **engine)
    second.accelerator.load_state(str(tmp_path / "state"))
    assert second.teleporter.step_count == 4
    second.train(data, range(4, 9))
    assert [record.step for record in second.teleporter.history] == [6]
    assert all(map(torch.equal, run.weights(), second.weights())) == (when != "before, plain attach")


def test_the_prepared_optimizer_is_refused_by_plain_attach_and_what_is_none_by_ours(fresh: Fresh) -> None:
    run = Run(fresh, "never")
    symmetries = fresh()[1]
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer has no step hooks; attach to the optimizer that it wraps"):
        tf.attach(run.optimizer, symmetries)
    with pytest.raises(TypeError, match=r"accelerator must be an accelerate\.Accelerator, got AdamW"):
        attach(innermost(run.optimizer), run.optimizer, symmetries)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer or wrap one in \.optimizer, got list"):
        attach(run.accelerator, [], symmetries)


def test_wrappers_are_taken_off(fresh: Fresh) -> None:
    model, symmetries = fresh()
    base = torch.optim.AdamW(model.parameters())
    run = Run(fresh, "never")
    assert innermost(run.optimizer) is run.optimizer.optimizer
    assert innermost(run.accelerator.prepare_optimizer(tf.Teleport(base, symmetries))) is base
    assert innermost(base) is base
