"""Rows of the support matrix: training stacks, each against a plain loop over the same batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf

Close = Callable[..., bool]
ENGINE: dict[str, Any] = {"objective": "grad_norm", "schedule": tf.Every(2), "radius": 0.2}
STEPS = 7
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(many workers|weights_only|pin_memory)"),
]


def needs(*packages: str) -> Any:
    found = [pytest.importorskip(name, reason=f"needs {name}; pip install -r requirements/dev.txt") for name in packages]
    return found[0]


class Task(nn.Module):
    """A run's loss as the Trainer takes it; remembers in which order it was given the batches."""

    def __init__(self, run: Any, net: nn.Module) -> None:
        super().__init__()
        self.net, self._run, self.seen = net, [run], list[int]()

    def forward(self, step: Tensor) -> dict[str, Tensor]:
        self.seen.append(int(step))
        return {"loss": self._run[0].loss(int(step))}


def train_in_the_trainer(arm: Any, run: Any, folder: Path, watch: Any = None) -> tuple[list[int], Any]:
    """A plain run's model under the column's optimizer, which the Trainer makes: the batches' order, and the teleporter."""
    transformers = needs("transformers", "accelerate")
    from teleport_fast.integrations.transformers import TeleportCallback, teleporting

    task = Task(run, run.model)
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=1, logging_steps=3, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=arm.options["lr"],
        weight_decay=run.optimizer.defaults["weight_decay"],
    )  # fmt: skip
    if arm.attached:
        pair: Any = teleporting(run.symmetries, args, optimizer=arm.make, optimizer_kwargs=arm.options, **ENGINE)
    elif arm.teleports:
        pair = tf.optim.AdamW, {**arm.options, "symmetries": run.symmetries, **ENGINE}
    else:
        pair = arm.make, dict(arm.options)
    callback = TeleportCallback() if arm.teleports else None
    trainer = transformers.Trainer(
        model=task, args=args, train_dataset=[{"step": step} for step in range(STEPS)], optimizer_cls_and_kwargs=pair,
        callbacks=[each for each in (callback, watch) if each is not None],
    )  # fmt: skip
    trainer.train()
    return task.seen, callback.teleporters[0] if callback else None


@pytest.mark.support("transformers' Trainer")
def test_the_trainer_takes_the_steps_of_a_loop(arm: Any, close: Close, tmp_path: Path) -> None:
    run, other = arm.run(plain=True), arm.run()
    order, teleporter = train_in_the_trainer(arm, run, tmp_path)
    for step in order:
        other.train(1, first=step)
    assert sorted(order) == list(range(STEPS)) and close(run.weights(), other.weights(), rtol=1e-7)
    assert teleporter is None or [record.step for record in teleporter.history] == other.teleports == [2, 4, 6]


@pytest.fixture(scope="module")
def adapted() -> tuple[nn.Module, tf.Symmetries]:
    peft = needs("peft")
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["0", "1", "2", "3"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).double()
    return model, tf.find_symmetries(model, example_inputs=(torch.randn(3, 4, dtype=torch.float64),))


@pytest.mark.support("PEFT's LoRA in the Trainer")
def test_adapters_teleport_and_the_base_stays(arm: Any, close: Close, adapted: tuple[nn.Module, tf.Symmetries], tmp_path: Path) -> None:
    """The adapters' joints are the only ones that move, and every teleport keeps the function."""
    runs = []
    for plain in (True, False):
        model = copy.deepcopy(adapted[0])
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        dense = adapted[1].select([joint.name for joint in adapted[1] if "lora" in joint.name])
        symmetries = tf.Symmetries(dense.joints, model=model)
        # the Trainer gives a class no names, which Rotated would go by
        params = trained if arm.teleports else [parameter for _, parameter in trained]
        runs.append(arm.run(model=model, symmetries=symmetries, params=params, plain=plain))
    run, other = runs
    moved, start = other.moved_outputs(), run.weights()
    names = [name for name, _ in run.model.named_parameters()]
    order, teleporter = train_in_the_trainer(arm, run, tmp_path)
    for step in order:
        other.train(1, first=step)
    changed = {name for name, one, two in zip(names, start, run.weights(), strict=True) if not torch.equal(one, two)}
    assert changed == {name for name in names if "lora" in name} and close(run.weights(), other.weights(), rtol=1e-7)
    assert len(moved) == (3 if arm.teleports else 0) and all(change < 1e-12 for change in moved)
    assert teleporter is None or [(r.step, r.joints) for r in teleporter.history] == [(2, 4), (4, 4), (6, 4)]


@pytest.mark.support("accelerate: attached before or after prepare, accumulated")
@pytest.mark.parametrize("when", ["before", "after"])
def test_prepared_and_accumulated_steps_are_those_of_a_loop(arm: Any, close: Close, when: str) -> None:
    accelerate = needs("accelerate")
    from teleport_fast.integrations.accelerate import attach

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    run, other = arm.run(plain=when == "after" and arm.attached), arm.run().train(STEPS)
    model, optimizer = accelerator.prepare(run.model, run.optimizer)
    engine = attach(accelerator, optimizer, run.symmetries, **ENGINE) if when == "after" and arm.attached else run.engine
    for step in range(STEPS):
        for rows in (slice(0, 3), slice(3, 6)):
            with accelerator.accumulate(model):
                accelerator.backward(run.loss(step, rows))
                optimizer.step()
                optimizer.zero_grad()
    assert close(run.weights(), other.weights(), rtol=1e-7)
    assert engine is None or [r.step for r in engine.history] == other.teleports == [2, 4, 6]
    assert engine is None or engine.step_count == STEPS


@pytest.mark.support("Lightning, automatic and manual optimisation")
@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_takes_the_steps_of_a_loop(arm: Any, close: Close, automatic: bool, tmp_path: Path) -> None:
    lightning = needs("lightning")
    from teleport_fast.integrations.lightning import TeleportCallback

    run, other = arm.run(plain=arm.attached), arm.run().train(STEPS)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = run.model, automatic

        def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
            loss: Tensor = run.loss(int(batch[0]))
            if automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def configure_optimizers(self) -> Any:
            return run.optimizer

    callback = TeleportCallback(run.symmetries, **ENGINE) if arm.attached else TeleportCallback()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback] if arm.teleports else [],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(STEPS)), batch_size=1))
    assert close(run.weights(), other.weights(), rtol=1e-9)
    assert not arm.teleports or [r.step for r in callback.teleporters[0].history] == other.teleports == [2, 4, 6]
