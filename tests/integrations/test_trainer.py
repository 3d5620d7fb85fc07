"""transformers' Trainer: the factory's optimizer is the Trainer's own and teleports, rows are the history, resumes are exact."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf

transformers = pytest.importorskip("transformers", reason="needs transformers; pip install -r requirements/dev.txt")
pytest.importorskip("accelerate", reason="needs accelerate; pip install -r requirements/dev.txt")

from teleport_fast.integrations.transformers import (  # noqa: E402
    FILE,
    TeleportCallback,
    TeleportFactory,
    parameter_groups,
    teleporting,
    unwrapped,
)

Fresh = Callable[[], tuple[Any, tf.Symmetries]]
Watch = Callable[[tf.Teleporter, Any], list[float]]
ENGINE: dict[str, Any] = {"objective": "grad_norm", "schedule": tf.Every(2), "radius": 0.2}


def arguments(folder: Path, **options: Any) -> Any:
    usual = {
        "max_steps": 7, "per_device_train_batch_size": 2, "logging_steps": 3, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "linear",
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **{**usual, **options})


def trainer(model: Any, args: Any, data: Any, pair: Any = None, callback: Any = None) -> Any:
    callbacks = [] if callback is None else [callback]
    return transformers.Trainer(model=model, args=args, train_dataset=data, optimizer_cls_and_kwargs=pair, callbacks=callbacks)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def rows(made: Any) -> list[dict[str, Any]]:
    """The callback's rows, without what the Trainer adds to every row."""
    found = [row for row in made.state.log_history if "teleport_step" in row]
    return [{key.removeprefix("teleport_"): v for key, v in row.items() if key.startswith("teleport_")} for row in found]


class Watcher(transformers.TrainerCallback):  # type: ignore[misc]
    """Looks at the outputs around every teleport, and at the optimizer's rates at every step."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.rates = watch, list[float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.optimizer = given["optimizer"].optimizer
        (self.teleporter,) = tf.optimizer.attached_to(self.optimizer)
        self.moved = self.watch(self.teleporter, given["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])


def test_teleports_keep_the_function_count_real_steps_and_the_schedule_arrives(
    fresh: Fresh, data: Any, watch: Watch, tmp_path: Path
) -> None:
    """Three micro-batches a step: seven steps are counted, not 21."""
    (llama, symmetries), args = fresh(), arguments(tmp_path, gradient_accumulation_steps=3)
    watcher = Watcher(watch)
    made = trainer(llama, args, data, teleporting(symmetries, args, **ENGINE), watcher)
    made.train()
    assert [record.step for record in watcher.teleporter.history] == [2, 4, 6]
    assert watcher.teleporter.step_count == 7
    assert len(watcher.moved) == 3 and max(watcher.moved) < 1e-6  # a norm casts to float32
    assert watcher.rates == pytest.approx([1e-2 * (1 - i / 7) for i in range(7)])
    assert all(r.objective_after > 1.01 * r.objective_before for r in watcher.teleporter.history)


def test_without_a_teleport_it_is_the_trainers_own_optimizer_bit_for_bit(
    fresh: Fresh, data: Any, tmp_path: Path
) -> None:
    """With one (the control) it is not. Checkpoints have the same groups, so they go to a plain run and back."""
    args = arguments(tmp_path, adam_beta2=0.9)
    ends, states = [], []
    for engine in (None, {"schedule": tf.At(100)}, ENGINE):
        model, symmetries = fresh()
        made = trainer(model, args, data, None if engine is None else teleporting(symmetries, args, **engine))
        made.train()
        ends.append(weights(model))
        states.append(made.optimizer.state_dict())
    assert all(map(torch.equal, ends[0], ends[1]))
    assert not all(map(torch.equal, ends[0], ends[2]))
    shapes = [[len(group["params"]) for group in state["param_groups"]] for state in states]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 2


@pytest.mark.parametrize("through_trainer", [False, True])
def test_the_callbacks_rows_are_the_history(
    fresh: Fresh, data: Any, tmp_path: Path, through_trainer: bool
) -> None:
    (llama, symmetries), args, callback = fresh(), arguments(tmp_path), TeleportCallback()
    made = trainer(llama, args, data, teleporting(symmetries, args, **ENGINE), callback)
    if through_trainer:
        callback.trainer = made
    made.train()
    (teleporter,) = callback.teleporters
    assert rows(made) == teleporter.history.to_rows() and len(teleporter.history) == 3
    assert all(1 < record.condition < 2 for record in teleporter.history)
    # the Trainer's own rows are still there, and a row comes with the log after it
    logged = [("loss" in row, row["step"]) for row in made.state.log_history if "train_loss" not in row]
    assert logged == [(True, 3), (False, 3), (True, 6), (False, 6), (False, 7)]


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    fresh: Fresh, data: Any, tmp_path: Path, with_memory: bool
) -> None:
    """Saved between two refreshes of the eigenbasis. Without its memory (the control) the run is another, and says so."""
    engine = {"objective": "eigenbasis", "schedule": tf.Every(3)}
    (llama, symmetries), (model, others) = fresh(), fresh()
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, save_only_model=False, max_steps=8)
    made = trainer(llama, args, data, teleporting(symmetries, args, **engine), TeleportCallback())
    made.train()
    assert (tmp_path / "checkpoint-4" / FILE).is_file()
    if not with_memory:
        (tmp_path / "checkpoint-4" / FILE).unlink()
    callback = TeleportCallback()
    second = trainer(model, args, data, teleporting(others, args, **engine), callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    said = [str(warning.message) for warning in caught if "the teleporters' memory starts anew" in str(warning.message)]
    assert len(said) == (0 if with_memory else 1)
    assert [record.step for record in callback.teleporters[0].history] == [6]
    assert all(map(torch.equal, weights(llama), weights(model))) == with_memory
    # the rows of the first half came with the Trainer's state
    assert [row["step"] for row in rows(second)] == [3, 6]


@pytest.mark.filterwarnings("ignore:teleport_fast. parameter .* has no gradient:RuntimeWarning")
def test_peft_adapters_teleport_and_the_frozen_base_stays(fresh: Fresh, data: Any, watch: Watch, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft; pip install -r requirements/dev.txt")
    llama, _ = fresh()
    frozen = [parameter.detach().clone() for parameter in llama.parameters()]
    adapted = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = adapted.double()
    symmetries = tf.find_symmetries(adapted, {"input_ids": torch.tensor([[3, 1, 4, 1, 5, 9]])})
    watcher, args = Watcher(watch), arguments(tmp_path)
    made = trainer(adapted, args, data, teleporting(symmetries, args, **ENGINE), watcher)
    made.train()
    assert [record.joints for record in watcher.teleporter.history] == [2, 2, 2]
    assert max(watcher.moved) < 1e-6
    base = {name: parameter for name, parameter in adapted.named_parameters() if "lora" not in name}
    assert len(base) == len(frozen) and all(map(torch.equal, base.values(), frozen))


def test_another_optimizer_is_called_with_the_trainers_rate(
    fresh: Fresh, data: Any, tmp_path: Path
) -> None:
    """schedulefree: the Trainer puts it into train and eval mode by itself."""
    schedulefree = pytest.importorskip("schedulefree", reason="needs schedulefree; pip install -r requirements/dev.txt")
    (llama, symmetries), args, callback = fresh(), arguments(tmp_path, lr_scheduler_type="constant"), TeleportCallback()
    options = {"optimizer": schedulefree.AdamWScheduleFree, "optimizer_kwargs": {"betas": (0.8, 0.9)}}
    made = trainer(llama, args, data, teleporting(symmetries, args, **options, **ENGINE), callback)
    made.train()
    inner = made.optimizer.optimizer
    assert isinstance(inner, schedulefree.AdamWScheduleFree) and inner.param_groups[0]["betas"] == (0.8, 0.9)
    assert inner.param_groups[0]["lr"] == 1e-2 and len(callback.teleporters[0].history) == 3


def test_groups_have_the_names_of_the_model_before_it_was_wrapped(fresh: Fresh) -> None:
    """As a wrapper that renames parameters leaves them: the factory is called with it where the Trainer is late."""
    llama, _ = fresh()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._fsdp_wrapped_module = llama

    named = {name for group in parameter_groups(Wrapped(), 0.1) for name, _ in group["params"]}
    assert named == {name for name, _ in llama.named_parameters()}
    assert unwrapped("module._orig_mod.layers.0._checkpoint_wrapped_module.weight") == "layers.0.weight"
    decays = {name: group["weight_decay"] for group in parameter_groups(llama, 0.1) for name, _ in group["params"]}
    assert decays["model.norm.weight"] == 0 and decays["lm_head.weight"] == 0.1


def test_the_factory_serves_a_wrapped_model_by_name(fresh: Fresh, tmp_path: Path) -> None:
    """Parameters of other identity, as sharding leaves them, under a wrapper's names."""
    llama, symmetries = fresh()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._fsdp_wrapped_module = copy.deepcopy(llama)

    factory, kwargs = teleporting(symmetries, arguments(tmp_path), **ENGINE)
    assert factory is TeleportFactory
    wrapped = Wrapped()
    optimizer = factory()(wrapped, **kwargs)
    (teleporter,) = tf.optimizer.attached_to(optimizer)
    moving = {id(parameter) for parameter in teleporter.plan.parameters(optimizer).values()}
    assert moving and moving <= {id(parameter) for parameter in wrapped.parameters()}


def test_wrong_uses_are_refused(fresh: Fresh, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (llama, symmetries), args = fresh(), arguments(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"args\.optim='.*' makes parameter groups of its own"):
        patch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.AdamW, {"params": []}))
        trainer(llama, args, data, teleporting(symmetries, args)).train()
    with pytest.raises(ValueError, match=r"found no teleporter on the Trainer's optimizer; pass Trainer\(optimizer_cls_and"):
        trainer(llama, args, data, None, TeleportCallback()).train()
    with pytest.raises(TypeError, match=r"args must be the Trainer's TrainingArguments, got dict"):
        teleporting(symmetries, {"learning_rate": 1.0})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'speed'"):
        trainer(llama, args, data, teleporting(symmetries, arguments(tmp_path), speed=3)).train()
    with pytest.raises(ValueError, match=r"objective must be one of .*, got 'gradnorm'"):
        trainer(llama, args, data, teleporting(symmetries, arguments(tmp_path), objective="gradnorm")).train()
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"is not in the optimizer"):
        trainer(llama, args, data, teleporting(tf.find_symmetries(other), arguments(tmp_path))).train()


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "teleport_fast.integrations.transformers")
    with pytest.raises(ModuleNotFoundError, match=r"transformers is missing: .*pip install 'teleport-fast\[models\]'"):
        import teleport_fast.integrations.transformers  # noqa: F401
