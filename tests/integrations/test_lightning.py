"""Lightning: automatic and manual optimisation, its loggers, its checkpoints."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.symmetry import Diagonal, GeneralLinear

pytest.importorskip("lightning", reason="needs lightning; pip install -r requirements/dev.txt")

import lightning
from lightning.pytorch.loggers.logger import DummyLogger

from teleport_fast.integrations.lightning import TeleportCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*torch.load. with .weights_only=False"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
ENGINE: dict[str, Any] = {"objective": "grad_norm", "schedule": tf.Every(2), "radius": 0.2}


class Module(lightning.LightningModule):
    """Four linear layers in `net`; AdamW with a schedule by steps."""

    def __init__(self, automatic: bool = True, attaches: tf.Symmetries | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).double()
        self.automatic_optimization, self.attaches = automatic, attaches
        self.rates: list[float] = []

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - x.roll(1, dims=1)).square().mean()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch[0])
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        # two halves are accumulated by hand
        for half in batch[0].chunk(2):
            self.manual_backward(0.5 * self.loss(half))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.automatic_optimization:
            self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        if self.attaches is not None:
            tf.attach(optimizer, tf.Symmetries(self.attaches.joints, model=self.net), **ENGINE)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def joint(name: str, group: tf.symmetry.Group, first: int) -> tf.Joint:
    views = tf.View(f"{first}.weight", 0, 1, 4), tf.View(f"{first + 1}.weight", 1, 1, 4)
    return tf.Joint(name, name, group, 1, 4, (views[0],), (views[1],))


JOINTS = (joint("dense", GeneralLinear(4), 0), joint("diagonal", Diagonal(4), 2))


def symmetries(module: Module) -> tf.Symmetries:
    return tf.Symmetries(JOINTS, model=module.net)


class Rows(DummyLogger):
    """Keeps what it is given, where a logger would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("teleport/") for key in metrics):
            self.rows.append({"step": step, **{key.removeprefix("teleport/"): value for key, value in metrics.items()}})


class Watch(lightning.Callback):
    """How far each teleport moves the outputs."""

    def __init__(self, teleports: TeleportCallback) -> None:
        self.teleports, self.moved = teleports, list[float]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        x, before = torch.randn(5, 4, dtype=torch.float64), list[Tensor]()

        def outputs() -> Tensor:
            with torch.no_grad():
                found: Tensor = pl_module.net(x)
            return found

        (teleporter,) = self.teleports.teleporters
        teleporter.before_move.append(lambda _: before.append(outputs()))
        teleporter.after_move.append(lambda _: self.moved.append(float((outputs() - before[-1]).norm() / before[-1].norm())))


def fit(module: Module, callbacks: list[Any], batches: int = 7, folder: Path | None = None, ckpt: Any = None, **options: Any) -> Any:
    torch.set_num_threads(1)
    x = torch.randn(8 * batches, 4, generator=torch.Generator().manual_seed(1)).double()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    usual = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=3,
        callbacks=callbacks, default_root_dir=folder, **{**usual, **options},
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_teleports_keep_the_function_and_rows_are_the_history(automatic: bool, tmp_path: Path) -> None:
    module, logger = Module(automatic), Rows()
    callback = TeleportCallback(symmetries(module), **ENGINE)
    watch = Watch(callback)
    fit(module, [callback, watch], folder=tmp_path, logger=logger)
    (teleporter,) = callback.teleporters
    assert [record.step for record in teleporter.history] == [2, 4, 6] and teleporter.step_count == 7
    assert len(watch.moved) == 3 and max(watch.moved) < 1e-12
    assert module.rates == pytest.approx([1e-2 * 0.9**i for i in range(7)])
    assert logger.rows == teleporter.history.to_rows()
    assert all(record.condition > 1 for record in teleporter.history)


def test_accumulated_batches_are_no_steps(tmp_path: Path) -> None:
    module = Module()
    callback = TeleportCallback(symmetries(module), **ENGINE)
    fit(module, [callback], batches=15, folder=tmp_path, accumulate_grad_batches=3)
    assert [record.step for record in callback.teleporters[0].history] == [2, 4]
    assert callback.teleporters[0].step_count == 5


def test_attached_by_the_module_it_is_the_same_run_and_without_another(tmp_path: Path) -> None:
    ends = []
    for way in ("callback", "module", "never"):
        module = Module(attaches=symmetries(Module()) if way == "module" else None)
        callbacks: dict[str, list[Any]] = {"callback": [TeleportCallback(symmetries(module), **ENGINE)], "module": [TeleportCallback()]}
        fit(module, callbacks.get(way, []), folder=tmp_path)
        if way == "module":
            assert len(callbacks[way][0].teleporters[0].history) == 3
        ends.append([parameter.detach() for parameter in module.parameters()])
    assert all(map(torch.equal, ends[0], ends[1])) and not all(map(torch.equal, ends[0], ends[2]))


@pytest.mark.parametrize("with_memory", [True, False])
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, automatic: bool, with_memory: bool) -> None:
    """Epochs of four batches, the eigenbasis refreshed every three steps; without its memory (the control) another run."""
    engine = {"objective": "eigenbasis", "schedule": tf.Every(3)}
    first = Module(automatic)
    trainer = fit(first, [TeleportCallback(symmetries(first), **engine)], batches=4, folder=tmp_path)
    file = tmp_path / "four.ckpt"
    trainer.save_checkpoint(file)
    whole = Module(automatic)
    fit(whole, [TeleportCallback(symmetries(whole), **engine)], batches=4, folder=tmp_path, max_epochs=2)
    if not with_memory:
        state = torch.load(file, weights_only=False)
        state["callbacks"] = {}
        torch.save(state, file)
    second = Module(automatic)
    with torch.no_grad():
        second.net[0].weight.zero_()
    callback = TeleportCallback(symmetries(second), **engine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(second, [callback], batches=4, folder=tmp_path, ckpt=file, max_epochs=2)
    assert any("memory starts anew" in str(warning.message) for warning in caught) != with_memory
    assert [record.step for record in callback.teleporters[0].history] == [6] and callback.teleporters[0].step_count == 8
    assert all(map(torch.equal, whole.parameters(), second.parameters())) == with_memory


def test_wrong_uses_are_refused(tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(ValueError, match=r"no optimizer of the module teleports; pass TeleportCallback\(symmetries"):
        fit(module, [TeleportCallback()], folder=tmp_path)
    with pytest.raises(ValueError, match=r"objective needs symmetries to attach with"):
        TeleportCallback(objective="grad_norm")
    with pytest.raises(ValueError, match=r"index must be below 1, the optimizers of the module, got 1"):
        fit(module, [TeleportCallback(symmetries(module), index=1)], folder=tmp_path)
    with pytest.raises(ValueError, match=r"is not in the optimizer"):
        fit(module, [TeleportCallback(symmetries(copy.deepcopy(module)))], folder=tmp_path)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "teleport_fast.integrations.lightning")
    with pytest.raises(ModuleNotFoundError, match=r"is missing: .*pip install 'teleport-fast\[lightning\]'"):
        import teleport_fast.integrations.lightning  # noqa: F401
