"""transformers' Trainer: one argument makes its own optimizer teleport, one callback logs it. `python examples/hf_trainer.py`"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import teleport_fast as tf
from teleport_fast.integrations.transformers import TeleportCallback, teleporting

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=16, tie_word_embeddings=False,
)  # fmt: skip
model = LlamaForCausalLM(config)  # yours: from_pretrained(...)
counting = [(start + torch.arange(16)) % 64 for start in range(64)]
data = [{"input_ids": ids, "labels": ids} for ids in counting]

args = TrainingArguments(
    output_dir=tempfile.mkdtemp(), max_steps=12, per_device_train_batch_size=8, gradient_accumulation_steps=2,
    learning_rate=3e-3, lr_scheduler_type="cosine", logging_steps=4, save_steps=6, report_to=[], use_cpu=True, disable_tqdm=True,
)  # fmt: skip
symmetries = tf.find_symmetries(model, {"input_ids": counting[0][None]})

trainer = Trainer(
    model=model,
    args=args,
    train_dataset=data,
    # the line that is added; without it the Trainer makes the same optimizer, and nothing teleports
    optimizer_cls_and_kwargs=teleporting(symmetries, args, objective="eigenbasis", schedule=tf.Every(3)),
)
trainer.add_callback(callback := TeleportCallback(trainer))
trainer.train()

(teleporter,) = callback.teleporters
print([record.step for record in teleporter.history], "teleports,", teleporter.step_count, "steps")
