"""transformers' Trainer: a factory for `optimizer_cls_and_kwargs`, and a callback that logs teleports and resumes them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from teleport_fast.integrations.attached import Fresh, Memory, teleporters
from teleport_fast.optimizer import attach
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.teleporter import Teleporter

try:
    from transformers import Trainer, TrainerCallback
except ModuleNotFoundError as error:
    needed = "this needs transformers and accelerate; pip install 'teleport-fast[models]' (or: pip install transformers accelerate)"
    raise ModuleNotFoundError(f"{error.name} is missing: {needed}", name=error.name) from error

# both methods that are called of it read nothing of a Trainer
TRAINER: Any = Trainer
FILE = "teleporter.pt"
# what FSDP, activation checkpointing, compiling and data-parallel wrappers put into a parameter's name
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")


class TeleportFactory:
    """Makes the optimizer from the Trainer's model and attaches: the Trainer calls `factory()(model, **kwargs)`.

    It is given the model that is trained, wrapped or not, so it serves where the Trainer makes its optimizer late.
    """

    def __call__(
        self,
        model: nn.Module,
        symmetries: Symmetries,
        args: Any,
        optimizer: Callable[..., Optimizer] | None = None,
        optimizer_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Optimizer:
        kwargs = {"lr": args.learning_rate, **(optimizer_kwargs or {})}
        if optimizer is None:
            optimizer, kwargs = TRAINER.get_optimizer_cls_and_kwargs(args, model)
            own = [name for name in ("params", "model", "optimizer_dict") if name in kwargs]
            if own or not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
                raise ValueError(
                    f"args.optim={str(args.optim)!r} makes parameter groups of its own; pass teleporting(..., optimizer=the class)"
                )
        made = optimizer(parameter_groups(model, args.weight_decay), **kwargs)
        attach(made, symmetries, **options)
        return made


def teleporting(
    symmetries: Symmetries,
    args: Any,
    optimizer: Callable[..., Optimizer] | None = None,
    optimizer_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[type[TeleportFactory], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, so that its optimizer teleports.

    symmetries: `find_symmetries(model)`, of the model before the Trainer wraps it. args: the TrainingArguments. optimizer:
    a class, called with parameter groups, args.learning_rate and optimizer_kwargs; by default the one that args.optim names,
    with the arguments it has there. options: those of `attach` after symmetries. Weight decay is spread over parameters as
    the Trainer spreads it, so its checkpoints go to a plain run and back.
    Errors: ValueError for an args.optim that makes groups of its own, those of `attach`, both when training starts;
    TypeError for args that are none. Source: own; tests/integrations/test_trainer.py, examples/hf_trainer.py.
    """
    if not hasattr(args, "learning_rate") or not hasattr(args, "weight_decay"):
        raise TypeError(f"args must be the Trainer's TrainingArguments, got {type(args).__name__}; pass args=args")
    given = {"symmetries": symmetries, "args": args, "optimizer": optimizer, "optimizer_kwargs": optimizer_kwargs}
    return TeleportFactory, {**given, **options}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The Trainer's two groups, with decay and without, whose parameters have the names of the model before it was wrapped."""
    decayed = set(TRAINER.get_decay_parameter_names(None, model))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def group(decay: float, inside: bool) -> dict[str, Any]:
        named: list[tuple[str, Tensor]] = [(unwrapped(n), p) for n, p in trained if (n in decayed) == inside]
        # torch refuses an empty group without names beside one with names
        return {"params": named, "weight_decay": decay, **({} if named else {"param_names": []})}

    return [group(weight_decay, True), group(0.0, False)]


def unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class TeleportCallback(TrainerCallback):  # type: ignore[misc]  # mypy reads nothing of the stack
    """Logs each teleport, and saves what the objective remembers beside the Trainer's checkpoints.

    Rows (teleport_step, teleport_objective_before, ... as TeleportRecord has them) go to `trainer.state.log_history` whenever
    the Trainer logs or saves; with `trainer` given, through `trainer.log`, so that TensorBoard and the other reporters have them too:
    `trainer.add_callback(TeleportCallback(trainer))`. Numbers are read off the device only then. `teleporter.pt` in
    a checkpoint's folder is the teleporters' memory, loaded again when a run resumes from args.output_dir; `checkpoint` names
    the folder of a resume from elsewhere. `.teleporters` are those found when training starts.
    Errors: ValueError when training starts with an optimizer that does not teleport.
    Source: own; tests/integrations/test_trainer.py.
    """

    def __init__(self, trainer: Any = None, checkpoint: str | Path | None = None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint
        self._fresh = Fresh(())

    @property
    def teleporters(self) -> list[Teleporter]:
        return self._fresh.teleporters

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self._fresh = Fresh(teleporters([optimizer]))
        if not self.teleporters:
            raise ValueError(
                "TeleportCallback found no teleporter on the Trainer's optimizer; "
                "pass Trainer(optimizer_cls_and_kwargs=teleporting(symmetries, args, ...))"
            )
        for teleporter in self.teleporters:
            teleporter.with_condition = True
        if state.global_step > 0:
            self._resume(Path(self.checkpoint or self._folder(args, state)))

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def _resume(self, folder: Path) -> None:
        file = folder / FILE
        if file.exists():
            Memory.load(self.teleporters, torch.load(file, map_location="cpu", weights_only=True))
        elif Memory.is_needed(self.teleporters):
            warnings.warn(
                f"teleport_fast: {file} is missing: the teleporters' memory starts anew; pass TeleportCallback(checkpoint=folder) "
                f"where the run resumes from another folder",
                RuntimeWarning,
                stacklevel=2,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self._report(state)  # into the log that the checkpoint is about to carry

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = self._folder(args, state)
        if state.is_world_process_zero and folder.is_dir():
            torch.save(Memory.of(self.teleporters), folder / FILE)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not (logs and "teleport_step" in logs):
            self._report(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state)

    def _report(self, state: Any) -> None:
        for record in self._fresh.take():
            row = {f"teleport_{name}": value for name, value in dataclasses.asdict(record).items()}
            if self.trainer is None:
                state.log_history.append({**row, "epoch": state.epoch, "step": state.global_step})
            else:
                self.trainer.log(row)
