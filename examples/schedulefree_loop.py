"""schedulefree as the base: its averaged weights keep their function at a teleport. `python examples/schedulefree_loop.py`"""

import schedulefree
import torch
from torch.nn.functional import cross_entropy

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig

torch.manual_seed(0)
model = GPT(GPTConfig(vocab=64, d_model=32, layers=2, heads=4, context=15))
data = torch.stack([(start + torch.arange(16)) % 64 for start in range(64)])


def loss(ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
# the line that is added
teleporter = tf.attach(optimizer, tf.find_symmetries(model), objective="eigenbasis", schedule=tf.Every(3))

optimizer.train()
for _ in range(12):
    optimizer.zero_grad()
    loss(data[torch.randint(64, (8,))]).backward()
    optimizer.step()

optimizer.eval()  # the weights are the averages now
with torch.no_grad():
    print([record.step for record in teleporter.history], "teleports, loss", round(float(loss(data)), 3))
