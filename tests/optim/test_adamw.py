"""tf.optim.AdamW: the fused step is what a teleport and torch's AdamW do one after the other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.optim import adamw as module

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "relu2": {"mlp": "relu2"},
    "swiglu-gains-rotary": {"mlp": "swiglu", "gains": True, "positions": "rotary"},
    "relu-bias-fused": {"mlp": "relu", "bias": True, "fused_qkv": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[GPT, tf.Symmetries]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fields = VARIANTS[request.param]
    model = GPT(GPTConfig(vocab=13, context=6, d_model=8, layers=2, heads=2, hidden=12, **fields)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model, tf.find_symmetries(model)


class Counting:
    """Counts the calls of the fused op and the entries that they step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.entries = 0, 0
        run = module.teleport_adamw_

        def counted(parameters: list[Tensor], *args: Any, **kwargs: Any) -> None:
            self.calls, self.entries = self.calls + 1, self.entries + sum(p.numel() for p in parameters)
            run(parameters, *args, **kwargs)

        monkeypatch.setattr(module, "teleport_adamw_", counted)


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("objective", ["grad_norm", "grad_l1", "balance"])
def test_fused_steps_equal_attach_around_torchs_adamw(
    variant: tuple[GPT, tf.Symmetries], train: Callable[..., None], objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, state, counters and records; the fused op was used, and without teleports (the control) it differs.

    The residual stream moves last and moves everything, so that nothing could be fused before it under grad_l1.
    """
    counting = Counting(monkeypatch)
    joints = variant[1].select(lambda joint: joint.kind != "residual")
    models = [copy.deepcopy(variant[0]) for _ in range(3)]
    setup: dict[str, Any] = {"objective": objective, "schedule": tf.Every(2), "radius": 0.3}
    fused = tf.optim.AdamW(models[0].named_parameters(), **OPTIONS, symmetries=joints, **setup)
    plain = torch.optim.AdamW(models[1].named_parameters(), **OPTIONS)
    attached = tf.attach(plain, joints, **setup)
    for model, optimizer in zip(
        models, (fused, plain, torch.optim.AdamW(models[2].parameters(), **OPTIONS)), strict=True
    ):
        train(model, optimizer, 5)
    assert counting.calls >= 2
    assert counting.entries > 100
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=name)
        # a key's bias has a gradient that is rounding alone, and Adam divides it by its own size
        for key, value in plain.state[other].items():
            torch.testing.assert_close(fused.state[one][key], value, rtol=1e-9, atol=1e-15, msg=f"{name} {key}")
    assert fused.teleporter is not None
    assert fused.teleporter.step_count == attached.step_count == 5
    for record, expected in zip(fused.teleporter.history, attached.history, strict=True):
        close(record.objective_before, expected.objective_before)
        close(record.objective_after, expected.objective_after)
        assert record.step == expected.step and record.joints == expected.joints
    ends = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    assert float((ends[2] - ends[0]).norm()) > 0.05


def test_a_diagonal_move_before_another_joint_moves_its_parameters_is_not_fused(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, other = Counting(monkeypatch), copy.deepcopy(gpt)
    plain = torch.optim.AdamW(other.named_parameters(), **OPTIONS)
    tf.attach(plain, symmetries, "grad_l1", tf.At(1))
    train(
        gpt,
        tf.optim.AdamW(
            gpt.named_parameters(), **OPTIONS, symmetries=symmetries, objective="grad_l1", schedule=tf.At(1)
        ),
        3,
    )
    train(other, plain, 3)
    assert counting.calls == 0
    for one, two in zip(gpt.parameters(), other.parameters(), strict=True):
        close(one, two)


def test_without_symmetries_or_between_teleports_it_is_torchs_adamw_bit_for_bit(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], same: Callable[..., bool]
) -> None:
    models = [copy.deepcopy(gpt) for _ in range(3)]
    train(models[0], torch.optim.AdamW(models[0].parameters(), **OPTIONS), 4)
    train(models[1], tf.optim.AdamW(models[1].parameters(), **OPTIONS), 4)
    late = tf.optim.AdamW(models[2].named_parameters(), **OPTIONS, symmetries=symmetries, schedule=tf.At(4))
    train(models[2], late, 4)
    assert same(models[0], models[1]) and same(models[0], models[2])
    train(models[0], torch.optim.AdamW(models[0].parameters(), **OPTIONS), 1, first=4)
    train(models[2], late, 1, first=4)
    assert not same(models[0], models[2])


def test_the_state_loads_into_torchs_adamw_and_back(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], same: Callable[..., bool]
) -> None:
    other = copy.deepcopy(gpt)
    fused = tf.optim.AdamW(gpt.named_parameters(), **OPTIONS, symmetries=symmetries, schedule=tf.At(1, 5))
    train(gpt, fused, 3)
    plain = torch.optim.AdamW(other.named_parameters(), lr=1.0)
    other.load_state_dict(gpt.state_dict())
    plain.load_state_dict(copy.deepcopy(fused.state_dict()))
    train(gpt, fused, 1, first=3)
    train(other, plain, 1, first=3)
    assert same(gpt, other)
    again = copy.deepcopy(gpt)
    back = tf.optim.AdamW(again.named_parameters(), symmetries=symmetries, schedule=tf.At(1, 5))
    back.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(again, back, 1, first=4)
    train(gpt, fused, 1, first=4)
    assert same(again, gpt)
    assert back.teleporter is not None and back.teleporter.step_count == 4


@pytest.mark.filterwarnings("ignore:teleport_fast. parameter .* has no gradient:RuntimeWarning")
@pytest.mark.parametrize("groups", ["rates", "late"])
def test_joints_over_groups_of_different_rates_and_ages_are_stepped_apart(
    gpt: GPT, symmetries: tf.Symmetries, loss_of: Callable[..., Tensor], groups: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    runs: list[nn.Module] = []
    for door in ("fused", "attach"):
        model = copy.deepcopy(gpt)
        named = dict(model.named_parameters())
        first = "blocks.0.mlp.down.weight"
        parameters: Any = [
            {"params": [(first, named.pop(first))], "lr": 0.02 if groups == "rates" else 3e-3},
            {"params": [*named.items()]},
        ]
        setup: dict[str, Any] = {"objective": "grad_norm", "schedule": tf.At(2, 3)}
        if door == "fused":
            optimizer: Any = tf.optim.AdamW(parameters, **OPTIONS, symmetries=symmetries, **setup)
        else:
            optimizer = torch.optim.AdamW(parameters, **OPTIONS)
            tf.attach(optimizer, symmetries, **setup)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if groups == "late" and step == 0:
                model.get_parameter(first).grad = None
            optimizer.step()
        runs.append(model)
    for one, other in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        close(one, other)
    assert counting.calls > 2


def test_a_skipped_step_leaves_every_bit(
    gpt: GPT,
    symmetries: tf.Symmetries,
    train: Callable[..., None],
    loss_of: Callable[..., Tensor],
    same: Callable[..., bool],
) -> None:
    optimizer = tf.optim.AdamW(gpt.named_parameters(), **OPTIONS, symmetries=symmetries, schedule=tf.At(1))
    train(gpt, optimizer, 1)
    before = copy.deepcopy(gpt)
    loss_of(gpt, 1).backward()
    assert gpt.head.weight.grad is not None
    gpt.head.weight.grad[0, 0] = float("nan")
    with pytest.warns(
        RuntimeWarning, match=r"gradient of .* is not finite: no teleport, and this optimizer step is skipped"
    ):
        optimizer.step()
    assert same(gpt, before)


def test_a_copy_is_refused_where_it_would_teleport_no_more(gpt: GPT, symmetries: tf.Symmetries) -> None:
    optimizer = tf.optim.AdamW(gpt.named_parameters(), symmetries=symmetries)
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled: the copy would teleport no more"):
            copying(optimizer)
    plain = copy.deepcopy(tf.optim.AdamW(gpt.named_parameters()))
    assert plain.teleporter is None


def test_bad_arguments_are_attachs_errors(gpt: GPT, symmetries: tf.Symmetries) -> None:
    with pytest.raises(ValueError, match="radius must be positive, got -1"):
        tf.optim.AdamW(gpt.named_parameters(), symmetries=symmetries, radius=-1)
    with pytest.raises(TypeError, match="symmetries must be a Symmetries, got GPT"):
        tf.optim.AdamW(gpt.named_parameters(), symmetries=gpt)  # type: ignore[arg-type]
