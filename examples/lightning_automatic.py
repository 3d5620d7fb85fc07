"""Lightning: a callback is added, the module stays as it is; checkpoints resume. `python examples/lightning_automatic.py`"""

import tempfile

import lightning
import torch
from torch.nn.functional import cross_entropy

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.integrations.lightning import TeleportCallback


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(GPTConfig(vocab=64, d_model=32, layers=2, heads=4, context=15))

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        return cross_entropy(self.gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


torch.manual_seed(0)
module = Module()
data = torch.stack([(start + torch.arange(16)) % 64 for start in range(64)])
loader = torch.utils.data.DataLoader(data, batch_size=8)


def trainer(epochs: int, callback: TeleportCallback) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs, callbacks=[callback], default_root_dir=tempfile.mkdtemp(), accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


# the line that is added
callback = TeleportCallback(tf.find_symmetries(module.gpt), objective="eigenbasis", schedule=tf.Every(3))
first = trainer(1, callback)
first.fit(module, loader)
first.save_checkpoint(file := f"{tempfile.mkdtemp()}/last.ckpt")

trainer(2, callback).fit(module, loader, ckpt_path=file)
(teleporter,) = callback.teleporters
print([record.step for record in teleporter.history], "teleports after the resume,", teleporter.step_count, "steps")
