"""Around the step: whose state it is, what a checkpoint carries, how a run resumes, what detaching leaves."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig


@pytest.fixture(scope="module")
def found() -> tuple[GPT, tf.Symmetries]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=13, context=6, d_model=16, layers=1, heads=2, hidden=12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model, tf.find_symmetries(model)


@pytest.fixture
def gpt(found: tuple[GPT, tf.Symmetries]) -> GPT:
    torch.set_num_threads(1)
    return copy.deepcopy(found[0])


@pytest.fixture
def symmetries(found: tuple[GPT, tf.Symmetries]) -> tf.Symmetries:
    return found[1]


def train(model: GPT, optimizer: Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def loss_of(model: GPT, step: int) -> Tensor:
    ids = torch.randint(13, (3, 6), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def saved(*states: Any) -> list[Any]:
    """Through a file and back, as `torch.load` allows it by default."""
    buffer = io.BytesIO()
    torch.save(list(states), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("objective", ["eigenbasis", "random", "grad_norm"])
@pytest.mark.parametrize("frame", ["stay", "return"])
@pytest.mark.parametrize("with_teleporter", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    gpt: GPT, symmetries: tf.Symmetries, objective: str, frame: str, with_teleporter: bool
) -> None:
    """Interrupted between two teleports. The counter is in the optimizer's checkpoint, covariances and basis in the
    teleporter's: without the latter (the control) a run in the eigenbasis goes on differently."""

    def start(model: GPT) -> tuple[Optimizer, tf.Teleporter]:
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
        return optimizer, tf.attach(optimizer, symmetries, objective, tf.Every(3), frame=frame, seed=5)

    resumed = copy.deepcopy(gpt)
    optimizer, teleporter = start(gpt)
    train(gpt, optimizer, 4)
    states = saved(gpt.state_dict(), optimizer.state_dict(), teleporter.state_dict())
    train(gpt, optimizer, 5, first=4)
    second_optimizer, second = start(resumed)
    resumed.load_state_dict(states[0])
    second_optimizer.load_state_dict(states[1])
    if with_teleporter:
        second.load_state_dict(states[2])
    train(resumed, second_optimizer, 5, first=4)
    assert [record.step for record in second.history] == [6]
    assert second.step_count == teleporter.step_count == 9
    stateless = objective == "grad_norm" or (objective == "random" and frame == "stay")
    assert same(gpt, resumed) == (with_teleporter or stateless)


def test_checkpoints_go_from_teleported_to_plain_and_back_with_their_counter(
    gpt: GPT, symmetries: tf.Symmetries
) -> None:
    other = copy.deepcopy(gpt)
    optimizer = tf.Teleport(torch.optim.AdamW(gpt.named_parameters()), symmetries, "grad_norm", tf.At(5))
    plain = torch.optim.AdamW(other.named_parameters())
    train(gpt, optimizer, 3)
    weights, state = saved(gpt.state_dict(), optimizer.state_dict())
    other.load_state_dict(weights)
    plain.load_state_dict(state)
    train(other, plain, 1, first=3)
    train(gpt, optimizer, 1, first=3)
    assert same(gpt, other)
    assert state["param_groups"][0]["teleport_step"] == 3
    (state,) = saved(plain.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.teleporter.step_count == 3
    train(gpt, optimizer, 3, first=4)
    assert [record.step for record in optimizer.teleporter.history] == [5]


def test_a_checkpoint_that_knows_no_teleport_starts_the_count(gpt: GPT, symmetries: tf.Symmetries) -> None:
    plain = torch.optim.AdamW(gpt.named_parameters())
    train(gpt, plain, 2)
    (state,) = saved(plain.state_dict())
    teleporter = tf.attach(plain, symmetries, "grad_norm", tf.At(1))
    train(gpt, plain, 3, first=2)
    plain.load_state_dict(state)
    assert teleporter.step_count == 0
    train(gpt, plain, 2, first=2)
    assert [record.step for record in teleporter.history] == [1, 1]


def test_a_counter_that_was_loaded_before_attach_goes_on(gpt: GPT, symmetries: tf.Symmetries) -> None:
    optimizer = torch.optim.AdamW(gpt.named_parameters())
    tf.attach(optimizer, symmetries, "grad_norm", tf.At())
    train(gpt, optimizer, 4)
    fresh = torch.optim.AdamW(gpt.named_parameters())
    fresh.load_state_dict(*saved(optimizer.state_dict()))
    assert tf.attach(fresh, symmetries, "grad_norm", tf.At()).step_count == 4


def test_the_state_of_one_objective_does_not_load_into_another(gpt: GPT, symmetries: tf.Symmetries) -> None:
    optimizer = torch.optim.AdamW(gpt.named_parameters())
    turns = tf.attach(optimizer, symmetries, "eigenbasis", tf.Every(1))
    balance = tf.attach(optimizer, symmetries, "balance")
    train(gpt, optimizer, 1)
    with pytest.raises(ValueError, match=r"objective 'balance' has no state, got .*; load it into the objective that"):
        balance.load_state_dict(turns.state_dict())


def test_parameter_groups_are_teleported_together(gpt: GPT, symmetries: tf.Symmetries) -> None:
    """Groups with rates and weight decays of their own, one added later: the function stays, the rates hold."""
    vectors = [p for p in gpt.parameters() if p.ndim < 2]
    tables = [gpt.token.weight, gpt.head.weight]
    rest = [p for p in gpt.parameters() if all(p is not other for other in (*vectors, *tables))]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 1e-3}], weight_decay=0.1)
    optimizer.add_param_group({"params": tables, "lr": 0.0, "weight_decay": 0.0})
    teleporter = tf.attach(optimizer, symmetries_of(gpt, symmetries), "eigenbasis", tf.Every(2))
    extra = nn.Parameter(torch.ones(3))
    ids = torch.randint(13, (3, 6), generator=torch.Generator().manual_seed(99))
    logits: list[Tensor] = []
    teleporter.before_move.append(lambda _: logits.append(gpt(ids).detach()))
    teleporter.after_move.append(lambda _: logits.append(gpt(ids).detach()))
    train(gpt, optimizer, 3)
    optimizer.add_param_group({"params": [extra], "lr": 1e-3})
    lengths = gpt.token.weight.detach().norm(dim=1)
    train(gpt, optimizer, 2, first=3)
    assert [record.step for record in teleporter.history] == [2, 4]
    for before, after in zip(logits[::2], logits[1::2], strict=True):
        assert float((after - before).norm() / before.norm()) < 1e-4
    torch.testing.assert_close(gpt.token.weight.detach().norm(dim=1), lengths)


def symmetries_of(model: nn.Module, found: tf.Symmetries) -> tf.Symmetries:
    """The same joints on a copy, whose parameters an optimizer without names is searched for."""
    return tf.Symmetries(found.joints, model=model)


def test_names_and_identity_find_the_same_parameters(gpt: GPT, symmetries: tf.Symmetries) -> None:
    """An optimizer of `named_parameters()` of a copy, and one of `parameters()` of the model itself."""
    other = copy.deepcopy(gpt)
    by_name = torch.optim.AdamW(gpt.named_parameters())
    by_identity = torch.optim.AdamW(other.parameters())
    tf.attach(by_name, symmetries, "eigenbasis", tf.Every(1))
    tf.attach(by_identity, symmetries_of(other, symmetries), "eigenbasis", tf.Every(1))
    train(gpt, by_name, 3)
    train(other, by_identity, 3)
    assert same(gpt, other)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_gradient_scaler_unscales_for_a_teleport_with_a_fused_base(
    gpt: GPT, symmetries: tf.Symmetries, overflow: bool
) -> None:
    """A fused optimizer asks the scaler for scaled gradients and finds their scale on itself: Teleport must not."""
    models = gpt, copy.deepcopy(gpt)
    bases = [
        torch.optim.AdamW(model.named_parameters(), lr=1e-3, fused=fused)
        for model, fused in zip(models, (True, False), strict=True)
    ]
    optimizer = tf.Teleport(bases[0], symmetries, "eigenbasis", tf.At())
    for model, each in zip(models, (optimizer, bases[1]), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(3):
            each.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if overflow and step == 1:
                assert model.head.weight.grad is not None
                model.head.weight.grad[0, 0] = float("inf")
            scaler.step(each)
            scaler.update()
        assert scaler.get_scale() == (512 if overflow else 1024)
    assert optimizer.teleporter.step_count == (2 if overflow else 3)
    for fused, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_a_teleport_is_an_optimizer_whose_state_is_the_bases(gpt: GPT, symmetries: tf.Symmetries) -> None:
    base = torch.optim.AdamW(gpt.named_parameters(), lr=1e-3)
    optimizer = tf.Teleport(base, symmetries, "eigenbasis", tf.Every(1))
    assert isinstance(optimizer, Optimizer)
    train(gpt, optimizer, 2)
    for _ in range(2):
        assert optimizer.state is base.state
        assert optimizer.param_groups is base.param_groups
        assert optimizer.defaults is base.defaults
        optimizer.load_state_dict(*saved(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.5
    assert base.param_groups[0]["lr"] == 0.5
    optimizer.defaults, optimizer.state, optimizer.param_groups = {"lr": 1.0}, base.state, base.param_groups
    assert base.defaults == {"lr": 1.0}
    extra = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [extra], "param_names": ["extra"], "lr": 0.1})
    assert base.param_groups[1]["params"] == [extra]
    extra.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(extra.grad, torch.zeros(2))
    assert repr(optimizer).startswith("Teleport(AdamW")
    assert tf.Teleport(optimizer, symmetries, "balance").teleporter.optimizer is base
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = optimizer.no_such_attribute


def test_a_teleport_is_not_copied_and_says_what_to_do_instead(gpt: GPT, symmetries: tf.Symmetries) -> None:
    optimizer = tf.Teleport(torch.optim.AdamW(gpt.named_parameters()), symmetries, "eigenbasis", tf.Every(1))
    remedy = r"cannot be copied or pickled; copy its base and attach again, or save state_dict\(\)"
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=remedy):
            attempt(optimizer)
    assert copy.deepcopy(optimizer.base).state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_teleporter_is_not_copied_either_and_says_what_it_is(gpt: GPT, symmetries: tf.Symmetries) -> None:
    optimizer = torch.optim.AdamW(gpt.named_parameters())
    teleporter = tf.attach(optimizer, symmetries, "eigenbasis", tf.Every(1))
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled: .*; attach again, or save state_dict\(\)"):
            attempt(teleporter)
    joints = sum(len(bucket.joints) for bucket in teleporter.plan.buckets)
    rest = f"objective='eigenbasis', schedule=Every(1), frame='stay', {joints} of {len(symmetries)} joints)"
    assert repr(teleporter) == f"Teleporter(around AdamW, {rest}"
    teleporter.detach()
    assert repr(teleporter) == f"Teleporter(detached, {rest}"


def test_detaching_leaves_the_plain_optimizer(gpt: GPT, symmetries: tf.Symmetries) -> None:
    other = copy.deepcopy(gpt)
    optimizer, plain = (torch.optim.AdamW(m.named_parameters(), lr=1e-3) for m in (gpt, other))
    attributes, keys = set(vars(optimizer)), set(optimizer.param_groups[0])
    teleporter = tf.attach(optimizer, symmetries, "eigenbasis", tf.Every(1))
    train(gpt, optimizer, 3)
    teleporter.detach()
    teleporter.detach()
    assert set(vars(optimizer)) == attributes
    assert set(optimizer.param_groups[0]) == keys
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    other.load_state_dict(gpt.state_dict())
    plain.load_state_dict(*saved(optimizer.state_dict()))
    train(gpt, optimizer, 3)
    train(other, plain, 3)
    assert all(map(torch.equal, gpt.parameters(), other.parameters()))
    assert len(teleporter.history) == 2


def test_a_checkpoint_of_an_older_version_resumes_bit_for_bit() -> None:
    """tests/fixtures/older_state.pt: version 0.1.0 of 2026-11-26, AdamW with the eigenbasis in the return frame."""
    older = torch.load(Path(__file__).parent / "fixtures" / "older_state.pt", weights_only=True)
    views = (tf.View("0.weight", 0, 1, 4), tf.View("0.bias", 0, 1, 4)), (tf.View("1.weight", 1, 1, 4),)
    joint = tf.Joint("joint", "test", tf.symmetry.Orthogonal(4), 1, 4, *views)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    teleporter = tf.attach(optimizer, tf.Symmetries((joint,), model=model), "eigenbasis", tf.Every(3), frame="return")
    model.load_state_dict(older["model"])
    optimizer.load_state_dict(older["optimizer"])
    teleporter.load_state_dict(older["teleporter"])
    assert teleporter.step_count == 5
    for step in range(5, 9):
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert [record.step for record in teleporter.history] == [6]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), older["after_four_more"][name], rtol=1e-10, atol=1e-12)
    assert float((older["model"]["0.weight"] - older["after_four_more"]["0.weight"]).norm()) > 1e-3
