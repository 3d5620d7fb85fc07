"""accelerate's FSDP2, by itself and in transformers' Trainer: teleports are those of one process.

accelerate 1.15 takes an FSDP plugin on accelerators only; on a CPU these checks hand it over themselves, and what is run is then
accelerate's own code: it swaps the optimizer's parameters for placeholders, shards the model, and puts the shards there.
"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from typing import Any

import stand
import torch
import torch.distributed as dist
from ranks import on
from torch import Tensor, nn

import teleport_fast as tf

THERE = find_spec("accelerate") is not None and find_spec("transformers") is not None
ENGINE: dict[str, dict[str, Any]] = {
    "grad_norm": {"objective": "grad_norm", "schedule": tf.At(1, 3), "radius": 0.3},
    "eigenbasis": {"objective": "eigenbasis", "schedule": tf.Every(2)},
}
STEPS = 5


def prepare() -> None:
    stand.prepare()
    if THERE:
        import transformers.trainer  # noqa: F401


def shards_here(accelerator: Any) -> None:
    """Give accelerate its FSDP2 plugin on a CPU."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin


def environment() -> None:
    """What a launcher sets."""
    from accelerate.state import AcceleratorState, GradientState

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="localhost")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def sharded(model: nn.Module) -> bool:
    return all(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters())


def prepared_by_accelerate() -> None:
    from accelerate import Accelerator

    from teleport_fast.integrations.accelerate import attach

    for engine in ENGINE.values():
        plain = stand.built("gpt")
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        single = tf.attach(optimizer, stand.symmetries_of("gpt", plain), **engine)
        stand.trained(plain, optimizer, "gpt", STEPS)
        still = stand.built("gpt")
        stand.trained(still, torch.optim.AdamW(still.parameters(), lr=1e-2), "gpt", STEPS)
        assert stand.far(stand.weights(plain), stand.weights(still)) > 1e-3, "the control: without teleports it is another run"
        for when in ("before", "after") if engine["objective"] == "grad_norm" else ("before",):
            environment()
            accelerator = Accelerator(cpu=True)
            shards_here(accelerator)
            model = stand.built("gpt")
            symmetries = stand.symmetries_of("gpt", model)
            made: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
            teleporter: Any = attach(accelerator, made, symmetries, **engine) if when == "before" else None
            model, made = accelerator.prepare(model, made)
            if when == "after":
                teleporter = attach(accelerator, made, symmetries, **engine)
            assert sharded(model)
            stand.trained(model, made, "gpt", STEPS, share=True)
            assert [r.step for r in teleporter.history] == [r.step for r in single.history] != []
            assert stand.far(stand.weights(plain), stand.weights(model)) < 1e-9, (when, engine["objective"])


class Task(nn.Module):
    """The language model's loss on numbered batches, as the Trainer takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = stand.built("gpt"), list[int]()
        self.batches = list(stand.batches("gpt", 2 * STEPS, 1))

    def forward(self, number: Tensor) -> dict[str, Tensor]:
        self.seen.append(int(number))
        return {"loss": stand.loss_of(self.net, *self.batches[int(number)])}


def trained_by_the_trainer() -> None:
    """Each rank takes its own batches; one process that takes the means of both ranks' losses comes to the same weights."""
    import transformers

    from teleport_fast.integrations.transformers import TeleportCallback, teleporting

    engine = ENGINE["eigenbasis"]
    environment()
    task = Task()
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=1e-2, logging_steps=2,
        )  # fmt: skip
        callback = TeleportCallback()
        trainer = transformers.Trainer(
            model=task, args=args, train_dataset=[{"number": i} for i in range(2 * STEPS)], callbacks=[callback],
            optimizer_cls_and_kwargs=teleporting(stand.symmetries_of("gpt", task.net), args, **engine),
        )  # fmt: skip
        shards_here(trainer.accelerator)
        trainer.is_fsdp_enabled = True
        trainer.train()
    assert sharded(task.net)
    orders: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(orders, task.seen)
    assert sorted(orders[0] + orders[1]) == list(range(2 * STEPS))
    plain = Task()
    optimizer = torch.optim.AdamW(plain.net.parameters(), lr=1e-2, weight_decay=0.0)
    single = tf.attach(optimizer, stand.symmetries_of("gpt", plain.net), **engine)
    for numbers in zip(*orders, strict=True):
        losses = [plain(torch.tensor(number))["loss"] for number in numbers]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (teleporter,) = callback.teleporters
    assert [record.step for record in teleporter.history] == [record.step for record in single.history] != []
    assert stand.far(stand.weights(plain.net), stand.weights(task.net)) < 1e-9, engine["objective"]


if THERE:
    on(2)(prepared_by_accelerate)
    on(2)(trained_by_the_trainer)
