"""Lightning: a callback that attaches when fit starts, logs teleports, and is in Lightning's checkpoints."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from teleport_fast.integrations.attached import Fresh, Memory, innermost, teleporters
from teleport_fast.optimizer import attach
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.teleporter import Teleporter

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    needed = "this needs lightning; pip install 'teleport-fast[lightning]' (or: pip install lightning)"
    raise ModuleNotFoundError(f"{error.name} is missing: {needed}", name=error.name) from error


class TeleportCallback(Callback):  # type: ignore[misc]  # mypy reads nothing of the stack
    """`Trainer(callbacks=[TeleportCallback(symmetries, objective=..., schedule=...)])`: the module stays as it is.

    symmetries: `find_symmetries(model)`, of the module or of a part of it; None where `configure_optimizers` attaches by
    itself. index: which of the module's optimizers. options: those of `attach` after symmetries. Automatic and manual
    optimisation are alike: a step of the optimizer is a step, an accumulated batch is none. The teleporters' memory is in
    the checkpoint's callbacks, and goes on when `fit(ckpt_path=...)` resumes. Each record becomes a row of the trainer's
    loggers (teleport/objective_before and so on, at the step of the teleport), read off the device when Lightning logs.
    `.teleporters` are those of the present fit.
    Errors: when fit starts, those of `attach`; ValueError for an index that no optimizer has, and where nothing teleports.
    Source: own; tests/integrations/test_lightning.py, examples/lightning_automatic.py.
    """

    def __init__(self, symmetries: Symmetries | None = None, index: int = 0, **options: Any) -> None:
        if symmetries is None and options:
            raise ValueError(f"{next(iter(options))} needs symmetries to attach with; pass symmetries=find_symmetries(model)")
        self.symmetries, self.index, self.options = symmetries, index, options
        self._fresh = Fresh(())
        self._loaded: dict[str, Any] | None = None

    @property
    def teleporters(self) -> list[Teleporter]:
        return self._fresh.teleporters

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The callback's own state is loaded before this, the optimizers' after it."""
        if self.symmetries is not None:
            if not 0 <= self.index < len(trainer.optimizers):
                raise ValueError(f"index must be below {len(trainer.optimizers)}, the optimizers of the module, got {self.index}")
            attach(innermost(trainer.optimizers[self.index]), self.symmetries, **self.options)
        self._fresh = Fresh(teleporters(trainer.optimizers))
        if not self.teleporters:
            raise ValueError("no optimizer of the module teleports; pass TeleportCallback(symmetries, ...)")
        for teleporter in self.teleporters:
            teleporter.with_condition = True
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            Memory.load(self.teleporters, loaded)
        elif trainer.ckpt_path is not None and Memory.is_needed(self.teleporters):
            warnings.warn(
                f"teleport_fast: {trainer.ckpt_path} was saved without this callback: the teleporters' memory starts anew",
                RuntimeWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return Memory.of(self.teleporters)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._report(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._report(trainer)

    def _report(self, trainer: Any) -> None:
        if not trainer.loggers:
            return
        for record in self._fresh.take():
            row = dataclasses.asdict(record)
            step = row.pop("step")
            for logger in trainer.loggers:
                logger.log_metrics({f"teleport/{name}": value for name, value in row.items()}, step=step)
