"""accelerate: attach beside `prepare`, before or after it; checkpoints carry the teleporter. `python examples/accelerate_loop.py`"""

import tempfile

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.integrations.accelerate import attach

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
model = GPT(GPTConfig(vocab=64, d_model=32, layers=2, heads=4, context=15))
symmetries = tf.find_symmetries(model)  # before prepare: it may wrap the model
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
data = torch.stack([(start + torch.arange(16)) % 64 for start in range(64)])
loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)

model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
# the line that is added
teleporter = attach(accelerator, optimizer, symmetries, objective="eigenbasis", schedule=tf.Every(3))

for _ in range(3):
    for ids in loader:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

folder = tempfile.mkdtemp()
accelerator.save_state(folder)
accelerator.load_state(folder)
print([record.step for record in teleporter.history], "teleports,", teleporter.step_count, "steps")
