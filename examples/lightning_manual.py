"""Lightning with manual optimisation: attach in configure_optimizers, or by the callback. `python examples/lightning_manual.py`"""

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
        self.automatic_optimization = False
        self.gpt = GPT(GPTConfig(vocab=64, d_model=32, layers=2, heads=4, context=15))
        self.symmetries = tf.find_symmetries(self.gpt)

    def training_step(self, ids: torch.Tensor, index: int) -> None:
        optimizer = self.optimizers()
        for half in ids.chunk(2):
            self.manual_backward(0.5 * cross_entropy(self.gpt(half[:, :-1]).flatten(0, 1), half[:, 1:].flatten()))
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        # the line that is added
        tf.attach(optimizer, self.symmetries, objective="grad_norm", schedule=tf.Every(3), radius=0.2)
        return optimizer


torch.manual_seed(0)
data = torch.stack([(start + torch.arange(16)) % 64 for start in range(64)])
callback = TeleportCallback()  # logs, and is in the checkpoints
trainer = lightning.Trainer(
    max_epochs=1, callbacks=[callback], default_root_dir=tempfile.mkdtemp(), accelerator="cpu", devices=1,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8))

(teleporter,) = callback.teleporters
print([record.step for record in teleporter.history], "teleports,", teleporter.step_count, "steps")
