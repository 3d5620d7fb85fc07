"""PEFT's LoRA in the Trainer: each adapter's B A has a GL(r) of its own. `python examples/peft_lora.py`"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import teleport_fast as tf
from teleport_fast.integrations.transformers import TeleportCallback, teleporting

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=16, tie_word_embeddings=False,
)  # fmt: skip
base = LlamaForCausalLM(config)  # yours: from_pretrained(...)
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
counting = [(start + torch.arange(16)) % 64 for start in range(64)]
data = [{"input_ids": ids, "labels": ids} for ids in counting]

# real token ids: where all tokens are alike, attention hides the adapters of queries and keys
symmetries = tf.find_symmetries(model, {"input_ids": torch.stack(counting[:2])})
args = TrainingArguments(
    output_dir=tempfile.mkdtemp(), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-3,
    logging_steps=4, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
)  # fmt: skip

trainer = Trainer(
    model=model,
    args=args,
    train_dataset=data,
    # a step that is the same for every factorisation of B A; or objective="balance", "ratio", "eigenbasis": docs/lora.md
    optimizer_cls_and_kwargs=teleporting(symmetries, args, objective="scaled", frame="return"),
    callbacks=[callback := TeleportCallback()],
)
trainer.train()

(teleporter,) = callback.teleporters
print(len(teleporter.history), "teleports of", teleporter.history[-1].joints, "adapters")
