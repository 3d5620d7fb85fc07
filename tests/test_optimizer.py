"""The two front doors: a teleported step is the step of the mathematics, and everything around it is the base's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.experiments.gpt import GPT, GPTConfig


def make_gpt(**changes: Any) -> tuple[GPT, tf.Symmetries]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=13, context=6, d_model=16, layers=1, heads=2, hidden=12, **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model, tf.find_symmetries(model)


@pytest.fixture(scope="module")
def found() -> tuple[GPT, tf.Symmetries]:
    return make_gpt()


@pytest.fixture
def gpt(found: tuple[GPT, tf.Symmetries]) -> GPT:
    torch.set_num_threads(1)
    return copy.deepcopy(found[0])


@pytest.fixture
def symmetries(found: tuple[GPT, tf.Symmetries]) -> tf.Symmetries:
    return found[1]


def loss_of(model: GPT, step: int = 0) -> Tensor:
    ids = torch.randint(13, (3, 6), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: GPT, optimizer: Optimizer, steps: int, after: Callable[[], object] = lambda: None) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def preconditioned(joint: tf.Joint, g: Tensor, gradients: dict[str, Tensor], eta: float) -> dict[str, Tensor]:
    """ΔA₊ = −η P⁻¹ G₊ and ΔA₋ = −η P G₋ with P = gᵀg (docs/mathematics.md), all other tensors −η G."""
    steps = {name: -eta * gradient for name, gradient in gradients.items()}
    sides = [(view, -1) for view in joint.plus] + [(view, 1) for view in joint.minus]
    for view, sign in sides:
        rows = view.of(gradients[view.parameter])
        if joint.group.form == "dense":
            p = g.mT @ g
            moved = ((p if sign > 0 else torch.linalg.inv(p)) @ rows.flatten(2)).reshape(rows.shape)
        else:
            moved = g.pow(2 * sign * view.power)[..., None, None] * rows
        view.of(steps[view.parameter]).copy_(-eta * moved)
    return steps


@pytest.mark.parametrize("frame", ["stay", "return"])
@pytest.mark.parametrize(
    "variant", [{}, {"mlp": "swiglu", "positions": "rotary", "bias": True, "kv_heads": 1}], ids=["relu2", "rotary"]
)
def test_one_sgd_step_after_a_teleport_is_the_preconditioned_step_in_the_old_coordinates(
    frame: str, variant: dict[str, Any]
) -> None:
    model, symmetries = make_gpt(**variant)
    start = weights(model)
    elements = symmetries.random(0.4)
    for joint in symmetries:
        if joint.group.form == "permutation":
            continue
        model.load_state_dict(start, strict=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        tf.attach(optimizer, symmetries, objectives.Fixed({joint.name: elements[joint.name]}), tf.Once(), frame=frame)
        loss_of(model).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        if frame == "stay":
            symmetries.apply_(model, {joint.name: joint.group.inverse(elements[joint.name])})
        g = elements[joint.name]
        right, wrong = (preconditioned(joint, x, gradients, 0.3) for x in (g, joint.group.inverse(g)))
        after = weights(model)
        for name in start:
            assert float((after[name] - start[name] - right[name]).abs().max()) < 1e-10, (joint.name, name)
        if joint.group.holds_stretches:  # of a rotation P is the identity, whatever its direction
            error = max(float((after[n] - start[n] - wrong[n]).abs().max()) for n in joint.parameters())
            assert error > 1e-4, joint.name
        optimizer.zero_grad()


def test_a_step_costs_one_backward_and_one_forward(gpt: GPT, symmetries: tf.Symmetries) -> None:
    """Counted where nothing can hide: in the model's forward and in autograd's visits of every parameter."""
    for objective in ("eigenbasis", "grad_norm", "grad_l1", "balance"):
        forwards, backwards = [0], {name: 0 for name, _ in gpt.named_parameters()}

        def count_forward(*_: object, forwards: list[int] = forwards) -> None:
            forwards[0] += 1

        handles: list[Any] = [gpt.register_forward_hook(count_forward)]
        for name, parameter in gpt.named_parameters():

            def count_backward(_: Tensor, name: str = name, backwards: dict[str, int] = backwards) -> None:
                backwards[name] += 1

            handles.append(parameter.register_hook(count_backward))
        optimizer = torch.optim.AdamW(gpt.named_parameters())
        teleporter = tf.attach(optimizer, symmetries, objective, tf.Every(1))
        train(gpt, optimizer, 4)
        assert len(teleporter.history) == 3
        assert forwards == [4]
        assert set(backwards.values()) == {4}
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("door", ["attach", "Teleport"])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_runs_once_before_the_move_and_its_loss_comes_back(
    gpt: GPT, symmetries: tf.Symmetries, door: str, by_keyword: bool
) -> None:
    optimizer: Any = torch.optim.SGD(gpt.named_parameters(), lr=0.1)
    if door == "attach":
        teleporter = tf.attach(optimizer, symmetries, "grad_norm", tf.Once())
    else:
        optimizer = tf.Teleport(optimizer, symmetries, "grad_norm", tf.Once())
        teleporter = optimizer.teleporter
    other = copy.deepcopy(gpt)
    plain_way = torch.optim.SGD(other.named_parameters(), lr=0.1)
    tf.attach(plain_way, symmetries, "grad_norm", tf.Once())
    calls = []

    def closure() -> Tensor:
        calls.append(len(teleporter.history))
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(gpt)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert calls == [0]
    assert len(teleporter.history) == 1
    assert loss.item() == pytest.approx(train(other, plain_way, 1)[0], rel=1e-15)
    assert all(map(torch.equal, gpt.parameters(), other.parameters()))


@pytest.mark.parametrize("door", ["attach", "Teleport"])
def test_hooks_run_once_in_their_order_around_the_move(gpt: GPT, symmetries: tf.Symmetries, door: str) -> None:
    """Hooks from before `attach` see the gradients before the move; hooks after the step see weights that are back."""
    base = torch.optim.SGD(gpt.named_parameters(), lr=0.0)
    start, order = weights(gpt), []

    def note(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            drift = max(float((p.detach() - start[n]).abs().max()) for n, p in gpt.named_parameters())
            order.append((name, "moved" if drift > 1e-6 else "at home"))

        return hook

    base.register_step_pre_hook(note("early pre"))
    base.register_step_post_hook(note("early post"))
    if door == "attach":
        optimizer: Optimizer = base
        tf.attach(base, symmetries, "random", tf.Once(), frame="return")
    else:
        optimizer = tf.Teleport(base, symmetries, "random", tf.Once(), frame="return")
    optimizer.register_step_pre_hook(note("late pre"))
    optimizer.register_step_post_hook(note("late post"))
    everywhere = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    train(gpt, optimizer, 1)
    for handle in everywhere:
        handle.remove()
    assert order == [
        ("global pre", "at home"),
        ("early pre", "at home"),
        ("late pre", "moved"),
        ("early post", "at home"),
        ("late post", "at home"),
        ("global post", "at home"),
    ]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, total_iters=2)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_schedulers_do_not_notice(name: str) -> None:
    """The same rates and, since the identity is the only move, the same weights as without a teleporter."""
    view = tf.View("0.weight", 0, 1, 4), tf.View("1.weight", 1, 1, 4)
    joint = tf.Joint("joint", "test", tf.symmetry.GeneralLinear(4), 1, 4, (view[0],), (view[1],))
    runs = []
    for door in ("plain", "attach", "Teleport"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer: Optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
        setup: Any = (
            tf.Symmetries((joint,), model=model),
            objectives.Fixed({"joint": torch.eye(4)}),
            tf.Every(2),
            None,
            "return",
        )
        if door == "Teleport":
            optimizer = tf.Teleport(optimizer, *setup)
        elif door == "attach":
            tf.attach(optimizer, *setup)
        rates = []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lr_scheduler.step.*optimizer.step.*")
            scheduler = SCHEDULERS[name](optimizer)
            for _ in range(6):
                optimizer.zero_grad()
                loss = model(torch.ones(2, 3)).square().sum()
                loss.backward()
                optimizer.step()
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                rates.append([group["lr"] for group in optimizer.param_groups])
        runs.append((rates, [p.tolist() for p in model.parameters()]))
    assert runs[0] == runs[1] == runs[2]
    assert len({rate for (rate,) in runs[0][0]}) > 1
