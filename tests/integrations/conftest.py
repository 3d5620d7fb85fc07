"""A tiny Llama built from a config, its symmetries and its data: what the training stacks are tried on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import teleport_fast as tf

VOCAB = 13
Fresh = Callable[[], tuple[Any, tf.Symmetries]]


@pytest.fixture(scope="session")
def found() -> tuple[Any, tf.Symmetries]:
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install -r requirements/dev.txt")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    return model, tf.find_symmetries(model, {"input_ids": torch.arange(6)[None]})


@pytest.fixture
def fresh(found: tuple[Any, tf.Symmetries]) -> Fresh:
    """The model at its start, a new copy at every call, with its symmetries: these stacks give optimizers no names."""

    def made() -> tuple[Any, tf.Symmetries]:
        torch.set_num_threads(1)
        model = copy.deepcopy(found[0])
        return model, tf.Symmetries(found[1].joints, model=model)

    return made


@pytest.fixture(scope="session")
def data() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(VOCAB, (40, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def watch() -> Callable[[tf.Teleporter, Any], list[float]]:
    """How far each teleport moves the logits, relative to them; the list fills as training goes on."""

    def watched(teleporter: tf.Teleporter, model: Any) -> list[float]:
        ids = torch.randint(VOCAB, (3, 6), generator=torch.Generator().manual_seed(7))
        before: list[torch.Tensor] = []
        moved: list[float] = []

        def logits() -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = model(input_ids=ids).logits
            return found

        teleporter.before_move.append(lambda _: before.append(logits()))
        teleporter.after_move.append(lambda _: moved.append(float((logits() - before[-1]).norm() / before[-1].norm())))
        return moved

    return watched
