"""Momentum moves as the gradient does, resets start anew, and a mini-batch teleport that the full data refuse leaves no trace."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

from teleport_fast.data_dependent import CrossEntropy, MLPAction, RankWarning, carry_state_, reset_state_, teleport_
from teleport_fast.data_dependent.covector import push_covectors, undo

from .conftest import elements, network, relative

WIDTHS = (14, 12, 11, 10, 3)
FORMS = ["u_exact", "v_exact"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
    "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
}


def gradient(action: MLPAction, weights: list[Tensor], loss: CrossEntropy) -> list[Tensor]:
    leaves = [weight.clone().requires_grad_() for weight in weights]
    return list(torch.autograd.grad(loss(action.outputs(leaves)), leaves))


def directions(weights: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(weight) for weight in weights]


def inner(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def sequential(widths: tuple[int, ...] = (9, 8, 7, 4), bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers[:-1]).double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_carried_gradient_is_the_gradient_at_the_moved_weights(form: str, bias: bool) -> None:
    weights, X = network(WIDTHS, 8, bias=bias)
    action, loss = MLPAction(weights, X, form=form, bias=bias), CrossEntropy(torch.arange(8) % 3)
    gs = elements(action.widths)
    moved = action.apply(gs)
    before, after = gradient(action, weights, loss), gradient(action, moved, loss)
    carried = push_covectors(action, gs, moved, before)
    for layer in range(len(weights)):
        assert relative(carried[layer], after[layer]) < 1e-9
        # Negative control: as it was, the gradient is another covector.
        assert relative(before[layer], after[layer]) > 1e-2
    wrong = push_covectors(action, elements(action.widths, seed=2), moved, before)
    assert max(relative(w, a) for w, a in zip(wrong, after, strict=True)) > 1e-2


@pytest.mark.parametrize(("form", "batch"), [("u_exact", 8), ("v_exact", 8), ("v_exact", 20)])
def test_undo_goes_back_and_a_carried_covector_keeps_its_product_with_every_direction(form: str, batch: int) -> None:
    weights, X = network(WIDTHS, batch)
    action = MLPAction(weights, X, form=form)
    gs, delta, p = elements(action.widths, size=0.1), directions(weights), directions(weights)
    with warnings.catch_warnings():
        # Beyond the width the move is no symmetry, but it is still a map whose covectors move.
        warnings.simplefilter("ignore", RankWarning)
        moved = action.apply(gs)
        ahead, behind = (
            action.at([W + sign * 1e-5 * d for W, d in zip(weights, delta, strict=True)]).apply(gs) for sign in (1, -1)
        )
    for back, weight in zip(undo(action, gs, moved), weights, strict=True):
        assert relative(back, weight) < 1e-9
    pushed = [(a - b) / 2e-5 for a, b in zip(ahead, behind, strict=True)]
    scale = sum(float(x.norm() * y.norm()) for x, y in zip(p, delta, strict=True))
    assert abs(inner(push_covectors(action, gs, moved, p), pushed) - inner(p, delta)) < 1e-6 * scale
    assert abs(inner(p, pushed) - inner(p, delta)) > 1e-3 * scale


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", ["exp", "linear"])
@pytest.mark.parametrize("form", FORMS)
def test_a_momentum_of_one_gradient_is_the_gradient_after_a_whole_teleport(form: str, group: str, bias: bool) -> None:
    model = sequential(bias=bias)
    inputs, loss = torch.randn(5, 9, dtype=torch.float64), CrossEntropy(torch.arange(5) % 4)
    # At lr 0 a step fills the buffer with the gradient and moves nothing.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    loss(model(inputs).mT).backward()
    optimizer.step()
    old = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    report = teleport_(model, inputs, loss, optimizer, form=form, group=group, steps=3, lr=0.1)
    assert report.exact and report.objective_after > report.objective_before
    optimizer.zero_grad()
    loss(model(inputs).mT).backward()
    for parameter in model.parameters():
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert parameter.grad is not None and relative(buffer, parameter.grad) < 1e-8
    assert any(relative(before, p.grad) > 1e-3 for before, p in zip(old, model.parameters(), strict=True) if p.grad is not None)


def trained(name: str) -> tuple[nn.Sequential, torch.optim.Optimizer, Tensor, CrossEntropy]:
    model = sequential()
    optimizer = OPTIMIZERS[name](model.parameters())
    inputs, loss = torch.randn(5, 9, dtype=torch.float64), CrossEntropy(torch.arange(5) % 4)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(inputs).mT).backward()
        optimizer.step()
    return model, optimizer, inputs, loss


@pytest.mark.parametrize("state", ["carry", "reset", "keep"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_each_optimizer_goes_on_after_each_policy(name: str, state: str) -> None:
    model, optimizer, inputs, loss = trained(name)
    old = {id(p): copy.deepcopy(optimizer.state.get(p, {})) for p in model.parameters()}
    before = loss(model(inputs).mT).item()
    teleport_(model, inputs, loss, optimizer, state=state, steps=3, lr=0.1)
    assert loss(model(inputs).mT).item() == pytest.approx(before, rel=1e-10)
    for p in model.parameters():
        new, was = optimizer.state.get(p, {}), old[id(p)]
        # The last bias reads a row of ones, which no element moves.
        last = p is model[-1].bias
        if state == "reset":
            assert all(float(value.sum()) == 0 for key, value in new.items() if key in ("sum", "step"))
            assert name == "adagrad" or not new
            continue
        for key, value in was.items():
            moves = state == "carry" and not last and key in ("momentum_buffer", "exp_avg")
            assert (value is None and new[key] is None) or bool(torch.equal(value, new[key])) is not moves
    optimizer.zero_grad()
    loss(model(inputs).mT).backward()
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_projected_second_moment_is_that_of_uncorrelated_gradients() -> None:
    model = sequential((6, 5, 3), bias=False)
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3)
    inputs, loss = torch.randn(4, 6, dtype=torch.float64), CrossEntropy(torch.arange(4) % 3)
    loss(model(inputs).mT).backward()
    optimizer.step()
    v = optimizer.state[model[2].weight]["square_avg"].clone()
    action = MLPAction.from_sequential(model, inputs)
    report = action.teleport(loss, 1, 0.5).report
    carry_state_(optimizer, model, action, report, "project")
    (g,) = report.elements()[0]
    # The reader's gradient is G gᵀ, so its entries' variances are v (g∘g)ᵀ; 64 random signs know them to a fifth.
    assert relative(optimizer.state[model[2].weight]["square_avg"], v @ g.square().mT) < 0.3
    assert relative(v, v @ g.square().mT) > 0.05


def test_a_minibatch_teleport_that_the_full_data_refuse_leaves_everything_as_it_was() -> None:
    model, optimizer, _, _ = trained("momentum")
    inputs = torch.randn(60, 9, dtype=torch.float64)
    labels = torch.arange(60) % 4
    full = CrossEntropy(labels)
    loss = CrossEntropy(labels[:3])
    untouched, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    before = full(model(inputs).mT).item()
    wild = {"steps": 5, "lr": 1e3, "radius": 1.0}
    free = copy.deepcopy(model)
    teleport_(free, inputs[:3], loss, **wild)
    # The batch's own loss stands, so nothing but the full data can tell.
    assert loss(free(inputs[:3]).mT).item() == pytest.approx(loss(model(inputs[:3]).mT).item(), rel=1e-6)
    assert full(free(inputs).mT).item() > 2 * before
    report = teleport_(model, inputs[:3], loss, optimizer, check=(inputs, full), **wild)
    assert report.undone and report.recheck_before == pytest.approx(before) and report.recheck_after > 2 * before
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name])
    for index, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], state["state"][index]["momentum_buffer"])
    assert not teleport_(model, inputs[:3], loss, optimizer, check=(inputs, full), steps=1, lr=1e-3).undone


def test_what_cannot_be_carried_is_refused_and_leaves_the_weights() -> None:
    model, optimizer, inputs, _ = trained("momentum")
    untouched = copy.deepcopy(model.state_dict())
    many, loss = torch.randn(30, 9, dtype=torch.float64), CrossEntropy(torch.arange(30) % 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        with pytest.raises(ValueError, match="momentum cannot be carried: the batch of 30 exceeds the rank"):
            teleport_(model, many, loss, optimizer, steps=1)
        with pytest.raises(ValueError, match="momentum cannot be carried with keep_null_space=False"):
            teleport_(model, many, loss, optimizer, keep_null_space=False, form="v_exact", steps=1)
        plain = sequential(bias=False)
        action = MLPAction.from_sequential(plain, inputs, "v_exact")
        report = action.teleport(CrossEntropy(torch.arange(5) % 4), 1, 1e-3, parity=True).report
    with pytest.raises(ValueError, match=r"a published loop's steps \(parity\) are no group elements"):
        carry_state_(torch.optim.SGD(plain.parameters(), 0.1), plain, action, report)
    with pytest.raises(ValueError, match="state must be one of carry, reset, keep, got 'lose'"):
        teleport_(model, inputs, loss, optimizer, state="lose")
    with pytest.raises(ValueError, match="second_moments must be one of keep, project, got 'square'"):
        carry_state_(optimizer, model, action, report, "square")
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    reset_state_(optimizer, model)
    assert not optimizer.state
