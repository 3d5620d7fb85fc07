"""Each side steps where the other is orthonormal: SGD becomes ScaledGD, and every optimizer's step is one for all factorizations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.symmetry import Orthogonal, PositiveDiagonal

X, Y = (torch.randn(12, n, generator=torch.Generator().manual_seed(n)).double() for n in (7, 5))
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.03),
}
bases = pytest.mark.parametrize("base", BASES)


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 3, bias=False), nn.Linear(3, 5, bias=False)).double()


def dense(symmetries: tf.Symmetries) -> tf.Symmetries:
    return symmetries.select(lambda joint: joint.group.holds_stretches and joint.group.form == "dense")


def train(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> Tensor:
    for step in range(first, first + steps):
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(step))[:8]
        optimizer.zero_grad()
        (model(X[rows]) - Y[rows]).square().mean().backward()
        optimizer.step()
    return (model[1].weight @ model[0].weight).detach()


def test_sgd_is_scaled_gd_with_and_without_momentum() -> None:
    """The published step on A (r × n) and B (m × r): A − η (BᵀB)⁻¹ G_A, B − η G_B (A Aᵀ)⁻¹; plain SGD, the control, goes elsewhere."""
    for momentum in (0.0, 0.9):
        start = pair()
        plain, teleported, wanted = (copy.deepcopy(start) for _ in range(3))
        optimizer = torch.optim.SGD(teleported.parameters(), lr=0.05, momentum=momentum)
        tf.attach(optimizer, tf.find_symmetries(teleported), "scaled", frame="return")
        train(teleported, optimizer, 15)
        train(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=momentum), 15)
        a, b = wanted.parameters()
        average: list[Tensor | float] = [0.0, 0.0]
        for step in range(15):
            rows = torch.randperm(12, generator=torch.Generator().manual_seed(step))[:8]
            gradients = torch.autograd.grad((wanted(X[rows]) - Y[rows]).square().mean(), (a, b))
            average = [momentum * old + new for old, new in zip(average, gradients, strict=True)]
            with torch.no_grad():
                step_a, step_b = torch.linalg.inv(b.mT @ b) @ average[0], average[1] @ torch.linalg.inv(a @ a.mT)
                a -= 0.05 * step_a
                b -= 0.05 * step_b
        for got, want, control in zip(teleported.parameters(), wanted.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
            assert float((control - want).detach().abs().max()) > 1e-2


@bases
@pytest.mark.parametrize("objective", ["scaled", "balance", None])
def test_the_step_does_not_see_the_factorization(base: str, objective: str | None) -> None:
    """B A = (B g⁻¹)(g A): "scaled" trains one product from both under any base. Without it the products part; balance
    fixes P alone, which is all that SGD sees, so that elementwise bases part there too."""
    start = pair()
    other = copy.deepcopy(start)
    g = torch.randn(3, 3).double() + 2 * torch.eye(3)
    with torch.no_grad():
        other[0].weight.copy_(g @ start[0].weight)
        other[1].weight.copy_(start[1].weight @ torch.linalg.inv(g))
    products = []
    for model in (start, other):
        optimizer = BASES[base](model.parameters())
        if objective:
            tf.attach(optimizer, dense(tf.find_symmetries(model)), objective, tf.When(lambda info: True), frame="return")
        products.append(train(model, optimizer, 12))
    deviation = float((products[0] - products[1]).norm() / products[0].norm())
    same = objective == "scaled" or (objective == "balance" and base in ("sgd", "momentum"))
    assert deviation < 1e-10 if same else deviation > 1e-3


def test_a_side_whose_partner_is_zero_steps_plainly_and_joins_later() -> None:
    """LoRA begins with B = 0: at the first step only B has a gradient, from the second on both sides are preconditioned."""
    model = pair()
    nn.init.zeros_(model[1].weight)
    a, b = (p.detach().clone() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tf.attach(optimizer, tf.find_symmetries(model), "scaled", frame="return")
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:8]
    gradient = torch.autograd.grad((model(X[rows]) - Y[rows]).square().mean(), model[1].weight)[0]
    train(model, optimizer, 1)
    torch.testing.assert_close(model[0].weight.detach(), a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].weight.detach(), b - 0.05 * gradient @ torch.linalg.inv(a @ a.mT))
    end = train(model, optimizer, 30, first=1)
    assert bool(torch.isfinite(end).all())
    assert float((model[0].weight.detach() - a).abs().max()) > 1e-3


def test_attention_is_served_too(trial: Any) -> None:
    """V–O and Q–K of every kind of model, in float64: nothing moves at lr 0, and a step of SGD is W⁻¹ G with the other side's W."""
    served = dense(trial.symmetries)
    assert {joint.kind.removesuffix("-rotary") for joint in served} == {"value-output", "query-key"}
    start = {name: p.detach().clone() for name, p in trial.model.named_parameters()}
    optimizer = trial.sgd()
    teleporter = tf.attach(optimizer, served, "scaled", frame="return")
    for step in range(3):
        trial.backward(step)
        gradients = {name: g.clone() for name, g in trial.gradients().items()}
        optimizer.step()
        for name, g in trial.gradients().items():
            torch.testing.assert_close(g, gradients[name], rtol=1e-7, atol=1e-12)
    for name, p in trial.model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name], rtol=1e-9, atol=1e-10)
    assert all(record.joints == len(served) for record in teleporter.history)
    trial.backward(3)
    gradients = {name: g.clone() for name, g in trial.gradients().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    moved = {name: p.detach() for name, p in trial.model.named_parameters()}
    for joint in served:
        weight = {side: side_by_side(views, start) for side, views in (("plus", joint.plus), ("minus", joint.minus))}
        for views, other in ((joint.plus, "minus"), (joint.minus, "plus")):
            metric = joint.group.project(weight[other] @ weight[other].mT)
            step = side_by_side(views, moved) - side_by_side(views, start)
            gradient = side_by_side(views, gradients)
            torch.testing.assert_close(step, -0.01 * torch.linalg.solve(metric, gradient), rtol=1e-7, atol=1e-9)
            assert not torch.allclose(step, -0.01 * gradient, rtol=1e-2)


def side_by_side(views: tuple[tf.View, ...], tensors: dict[str, Tensor]) -> Tensor:
    """(heads, h, n) of one side of a joint."""
    return torch.cat([view.of(tensors[view.parameter]).flatten(2) for view in views], 2)


def test_a_resumed_run_is_the_whole_one_bit_for_bit() -> None:
    start, ends = pair(), []
    for cut in (None, 5):
        model = copy.deepcopy(start)
        optimizer = BASES["adamw"](model.parameters())
        teleporter = tf.attach(optimizer, tf.find_symmetries(model), "scaled", frame="return")
        train(model, optimizer, cut or 10)
        if cut:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), teleporter.state_dict()))
            model = copy.deepcopy(start)
            optimizer = BASES["adamw"](model.parameters())
            teleporter = tf.attach(optimizer, tf.find_symmetries(model), "scaled", frame="return")
            for part, state in zip((model, optimizer, teleporter), saved, strict=True):
                part.load_state_dict(state)
            train(model, optimizer, 10 - cut, first=cut)
        ends.append((model[1].weight @ model[0].weight).detach())
    assert torch.equal(*ends)


def test_it_refuses_to_stay_and_says_what_it_cannot_use() -> None:
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"frame must be 'return' for objective 'scaled', got 'stay'"):
        tf.attach(optimizer, tf.find_symmetries(model), "scaled")
    view, other = tf.View("w", 0, 1, 4), tf.View("v", 0, 1, 4)
    scaled = objectives.Scaled()
    assert scaled.unusable(tf.Joint("j", "t", Orthogonal(4), 1, 4, (view,), (other,))) == "O(4) holds no dense stretches"
    assert "no dense stretches" in str(scaled.unusable(tf.Joint("j", "t", PositiveDiagonal(4), 1, 4, (view,), (other,))))
    group = tf.symmetry.GeneralLinear(4)
    assert "one is empty" in str(scaled.unusable(tf.Joint("j", "t", group, 1, 4, (view,), ())))
