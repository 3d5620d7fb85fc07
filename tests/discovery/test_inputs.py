"""Guessed inputs fit the model's first layer and its context, and repeat."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from teleport_fast import find_symmetries
from teleport_fast.discovery.inputs import guess_inputs
from teleport_fast.experiments.gpt import GPT, GPTConfig


def test_a_model_with_tables_gets_ids_within_all_of_them() -> None:
    model = GPT(GPTConfig(vocab=50, context=9, d_model=16, layers=1, heads=2))
    (ids,) = guess_inputs(model)
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (2, 9))
    assert 0 <= int(ids.min()) <= int(ids.max()) < 50
    assert model(ids).shape == (2, 9, 50)


def test_a_long_context_is_not_filled() -> None:
    (ids,) = guess_inputs(GPT(GPTConfig(vocab=50, d_model=16, layers=1, heads=2)))
    assert tuple(ids.shape) == (2, 12)


def test_a_context_that_only_the_config_knows_is_kept() -> None:
    model = GPT(GPTConfig(vocab=50, context=5, d_model=16, layers=1, heads=2, positions="rotary"))
    assert tuple(guess_inputs(model)[0].shape) == (2, 5)
    assert "residual" in find_symmetries(model)


@pytest.mark.parametrize("name", ["context", "block_size", "n_positions", "max_position_embeddings", "max_seq_len"])
def test_a_context_goes_by_several_names(name: str) -> None:
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 4))
    setattr(model, name, 3)
    assert tuple(guess_inputs(model)[0].shape) == (2, 3)
    delattr(model, name)
    model.config = SimpleNamespace(**{name: 4})
    assert tuple(guess_inputs(model)[0].shape) == (2, 4)


def test_a_model_that_begins_with_a_layer_gets_noise() -> None:
    (x,) = guess_inputs(nn.Sequential(nn.Flatten(), nn.Linear(5, 3)))
    assert tuple(x.shape) == (4, 5)
    assert x.is_floating_point()
    assert float(x.std()) > 0.5


def test_bare_parameters_of_the_model_itself_do_not_matter() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    model.register_parameter("positions", nn.Parameter(torch.zeros(12, 4)))
    assert tuple(guess_inputs(model)[0].shape) == (2, 7)


def test_guesses_repeat_and_leave_torchs_generator_alone() -> None:
    model = nn.Linear(5, 3)
    state = torch.get_rng_state()
    assert torch.equal(guess_inputs(model)[0], guess_inputs(model)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_guessed_is_asked_for() -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), nn.LayerNorm(4)):
        with pytest.raises(ValueError, match=r"example_inputs is None and cannot be guessed .* pass a tuple or a dict"):
            guess_inputs(model)
