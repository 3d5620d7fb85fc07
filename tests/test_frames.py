"""Two frames, one optimizer: coming back leaves no trace, staying can be undone, and both take the same steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.experiments.gpt import GPT, GPTConfig

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "rmsprop-centered-momentum": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
}
bases = pytest.mark.parametrize("base", BASES)
frames = pytest.mark.parametrize("frame", ["stay", "return"])


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
def fresh(found: tuple[GPT, tf.Symmetries]) -> Callable[..., GPT]:
    torch.set_num_threads(1)
    return lambda dtype=torch.float32: copy.deepcopy(found[0]).to(dtype)


@pytest.fixture
def symmetries(found: tuple[GPT, tf.Symmetries]) -> tf.Symmetries:
    return found[1]


def train(model: GPT, optimizer: Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        ids = torch.randint(13, (3, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights, gradients and optimizer state, copied."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        if parameter.grad is not None:
            found[f"{name}.grad"] = parameter.grad.clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}.{key}"] = value.clone()
    return found


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def identities(symmetries: tf.Symmetries) -> dict[str, Tensor]:
    return {joint.name: joint.group.identity(joint.heads) for joint in symmetries}


@bases
def test_the_identity_and_a_schedule_that_never_fires_are_the_plain_optimizer_bit_for_bit(
    fresh: Callable[..., GPT], symmetries: tf.Symmetries, base: str
) -> None:
    """50 steps; the identity comes back after every one of them, through all of its matrix products."""
    plain = fresh()
    reference = BASES[base](plain.named_parameters())
    train(plain, reference, 50)
    wanted = everything(plain, reference)
    identity = objectives.Fixed(identities(symmetries))
    setups: list[dict[str, Any]] = [
        {"objective": identity, "schedule": tf.When(lambda info: True), "frame": "return"},
        {"objective": "grad_norm", "schedule": tf.At(), "frame": "stay"},
        {"objective": "eigenbasis", "schedule": tf.At(), "frame": "return"},
    ]
    for setup in setups:
        model = fresh()
        optimizer = BASES[base](model.named_parameters())
        teleporter = tf.attach(optimizer, symmetries, **setup)
        train(model, optimizer, 50)
        assert same_bits(everything(model, optimizer), wanted), setup
        assert len(teleporter.history) == (50 if setup["objective"] is identity else 0)


@bases
def test_a_real_element_is_not_the_plain_optimizer(
    fresh: Callable[..., GPT], symmetries: tf.Symmetries, base: str
) -> None:
    runs = []
    for elements in ({}, symmetries.random(0.5)):
        model = fresh()
        optimizer = BASES[base](model.named_parameters())
        if elements:
            tf.attach(optimizer, symmetries, objectives.Fixed(elements), tf.Every(1), frame="return")
        train(model, optimizer, 3)
        runs.append([parameter.detach() for parameter in model.parameters()])
    assert max(float((a - b).abs().max()) for a, b in zip(*runs, strict=True)) > 1e-3


def test_staying_and_then_the_inverse_restore_the_weights(
    fresh: Callable[..., GPT], symmetries: tf.Symmetries
) -> None:
    """Float32, every joint but the permutations, which do not commute with the scalings of the same units."""
    joints = symmetries.select(lambda joint: joint.group.form != "permutation")
    elements = joints.random(0.5)
    back = {joint.name: joint.group.inverse(elements[joint.name]) for joint in joints}
    model = fresh()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.0)
    tf.attach(optimizer, joints, objectives.Fixed(elements), tf.Once(0))
    tf.attach(optimizer, joints, objectives.Fixed(back), tf.Once(1))
    start = everything(model, optimizer)
    train(model, optimizer, 1)
    away = everything(model, optimizer)
    train(model, optimizer, 1, first=1)
    for name in start:
        assert float((away[name] - start[name]).abs().max()) > 1e-2
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), start[name], rtol=1e-6, atol=1e-6)


@frames
@pytest.mark.parametrize("objective", ["eigenbasis", "random", "grad_norm", "grad_l1"])
def test_only_the_return_frame_brings_the_weights_back(
    fresh: Callable[..., GPT], symmetries: tf.Symmetries, frame: str, objective: str
) -> None:
    model = fresh(torch.float64)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.0)
    tf.attach(optimizer, symmetries, objective, tf.Every(2), frame=frame)
    start = everything(model, optimizer)
    train(model, optimizer, 7)
    drift = max(float((p.detach() - start[n]).abs().max()) for n, p in model.named_parameters())
    assert drift < 1e-12 if frame == "return" else drift > 1e-2


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("base", ["adam", "adamw", "sgd"])
def test_both_frames_of_the_eigenbasis_train_one_function(
    fresh: Callable[..., GPT], symmetries: tf.Symmetries, base: str, decay: float
) -> None:
    """Rotations keep ‖w‖, so weight decay means the same in both; the plain run, the control, goes elsewhere."""
    make: dict[str, Callable[[Any], Optimizer]] = {
        "adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=decay),
        "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=decay),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=decay),
    }
    losses: dict[str, list[float]] = {}
    for frame in ("stay", "return", "plain"):
        model = fresh(torch.float64)
        optimizer = make[base](model.named_parameters())
        if frame != "plain":
            tf.attach(optimizer, symmetries, "eigenbasis", tf.Every(2), frame=frame)
        losses[frame] = train(model, optimizer, 12)
    assert losses["return"] == pytest.approx(losses["stay"], rel=1e-9)
    # a rotation changes nothing for SGD, whose step is the gradient; for elementwise steps it changes everything
    assert (losses["plain"] == pytest.approx(losses["stay"], rel=1e-9)) == (base == "sgd")


def test_a_reset_in_the_return_frame_happens_at_refreshes_only(
    fresh: Callable[..., GPT], symmetries: tf.Symmetries
) -> None:
    """Between refreshes the optimizer lives in the held basis: turning there and back must not cost it its memory."""
    losses = {}
    for frame in ("stay", "return"):
        model = fresh(torch.float64)
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
        tf.attach(optimizer, symmetries, "eigenbasis", tf.At(2), frame=frame, second_moments="reset")
        losses[frame] = train(model, optimizer, 8)
        assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}
    assert losses["return"] == pytest.approx(losses["stay"], rel=1e-9)


def test_a_joint_whose_gradient_is_missing_for_one_step_is_not_turned_in_that_step(
    fresh: Callable[..., GPT], symmetries: tf.Symmetries
) -> None:
    model = fresh(torch.float64)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.0)
    turned = symmetries.select(lambda joint: joint.kind == "value-output")
    tf.attach(optimizer, turned, "eigenbasis", tf.At(1), frame="return")
    start = everything(model, optimizer)
    train(model, optimizer, 3)
    model.get_parameter("blocks.0.attention.v.weight").requires_grad_(False)
    with pytest.warns(RuntimeWarning, match=r"'blocks\.0\.attention\.v\.weight' has no gradient"):
        train(model, optimizer, 1, first=3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), start[name], rtol=1e-12, atol=1e-12)


def test_two_teleporters_come_back_in_the_reverse_order(
    fresh: Callable[..., GPT], symmetries: tf.Symmetries
) -> None:
    """Two elements of one joint that do not commute: undone in the order in which they came, they would drift."""
    name = "blocks.0.attention.value-output"
    model = fresh(torch.float64)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.0)
    for seed in (1, 2):
        elements = symmetries.random(0.5, torch.Generator().manual_seed(seed))
        tf.attach(optimizer, symmetries, objectives.Fixed({name: elements[name]}), tf.Once(), frame="return")
    start = everything(model, optimizer)
    train(model, optimizer, 1)
    for key in start:
        torch.testing.assert_close(dict(model.named_parameters())[key].detach(), start[key], rtol=1e-12, atol=1e-12)
