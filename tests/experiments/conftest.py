"""A text of a few kilobytes and a setting that trains in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teleport_fast.experiments.gpt import GPTConfig
from teleport_fast.experiments.text import Text
from teleport_fast.experiments.train import Setting


@pytest.fixture
def tiny_text() -> Text:
    generator = torch.Generator().manual_seed(0)
    train, held_out = torch.randint(97, 123, (2, 4000), generator=generator).byte()
    return Text(train, held_out, (Path("a"),), (Path("b"),), "letters at random")


@pytest.fixture
def tiny() -> Setting:
    model = GPTConfig(d_model=32, layers=2, heads=2, context=16)
    return Setting(model, steps=6, batch=2, validate_every=3, validation_windows=4)


@pytest.fixture(autouse=True)
def one_thread(same_seed_and_settings: None) -> None:
    """At these sizes a second thread only waits, and on a busy machine it waits long."""
    torch.set_num_threads(1)
