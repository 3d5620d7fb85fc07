"""Optimizer state after a move is the state that the optimizer would have in the new coordinates, or is refused."""

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
from teleport_fast.state import ROLES, forget_, state_sources
from teleport_fast.symmetry import Diagonal, GeneralLinear, Orthogonal, Permutation

# eps so small that it does not show: it is the one part of these optimizers that knows the unit of a weight
TINY = 1e-200
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.0, eps=TINY),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.0, amsgrad=True, eps=TINY),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.0, eps=TINY),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.0, eps=TINY),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.0, centered=True, momentum=0.9, eps=TINY),
}
GROUPS = [Diagonal(4), Permutation(4), Orthogonal(4), GeneralLinear(4)]
bases = pytest.mark.parametrize("base", BASES)


def linear_chain(group: tf.symmetry.Group) -> tuple[nn.Sequential, tf.Symmetries]:
    """Linear, linear, linear: every invertible matrix is a symmetry of the space between the first two."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    plus = tf.View("0.weight", 0, 1, 4), tf.View("0.bias", 0, 1, 4)
    joint = tf.Joint("joint", "test", group, 1, 4, plus, (tf.View("1.weight", 1, 1, 4),))
    return model, tf.Symmetries((joint,), model=model)


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(x).pow(3).sum().backward()


def run(model: nn.Module, optimizer: Optimizer, steps: int) -> dict[str, dict[str, Tensor]]:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}


def both_states(
    base: str, group: tf.symmetry.Group, wrong: bool = False
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """After a teleport in mid-run, and after the same run in the new coordinates from the start; lr 0: no drift."""
    model, symmetries = linear_chain(group)
    there = copy.deepcopy(model)
    elements = symmetries.random(0.4)
    symmetries.apply_(there, elements)
    if wrong:
        elements = {"joint": symmetries["joint"].group.inverse(elements["joint"])}
    optimizer = BASES[base](model.parameters())
    tf.attach(optimizer, symmetries, objectives.Fixed(elements), tf.At(3))
    return run(model, optimizer, 5), run(there, BASES[base](there.parameters()), 5)


def gap(here: dict[str, dict[str, Tensor]], there: dict[str, dict[str, Tensor]], keys: set[str]) -> float:
    pairs = [(here[n][k], there[n][k]) for n in there for k in there[n] if k in keys]
    assert pairs, f"no state among {sorted(keys)}"
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


EXACT = [Diagonal(4), Permutation(4)]


@bases
@pytest.mark.parametrize("group", EXACT, ids=str)
def test_all_state_is_carried_exactly_by_diagonals_and_permutations(base: str, group: tf.symmetry.Group) -> None:
    """RMSprop's momentum included: it averages G/√v, from which a diagonal cancels."""
    assert gap(*both_states(base, group), keys=set(ROLES)) < 1e-12


@pytest.mark.parametrize("base", [base for base in BASES if base != "adagrad"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_first_moments_are_carried_exactly_by_every_group(base: str, group: tf.symmetry.Group) -> None:
    keys = {"exp_avg", "grad_avg"} if base == "rmsprop" else {"exp_avg", "momentum_buffer"}
    assert gap(*both_states(base, group), keys=keys) < 1e-12


@bases
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_a_wrong_element_leaves_the_state_of_other_coordinates(base: str, group: tf.symmetry.Group) -> None:
    assert gap(*both_states(base, group, wrong=True), keys=set(ROLES)) > 1e-2


def test_momentum_sgd_runs_on_as_in_the_other_coordinates() -> None:
    """Under a rotation SGD with momentum and weight decay is equivariant; under a stretch (a control) it is not."""
    for group, same in ((Orthogonal(4), True), (GeneralLinear(4), False)):
        model, symmetries = linear_chain(group)
        there = copy.deepcopy(model)
        elements = symmetries.random(0.5)
        symmetries.apply_(there, elements)
        optimizers = [torch.optim.SGD(m.parameters(), 1e-3, 0.9, weight_decay=0.1) for m in (model, there)]
        tf.attach(optimizers[0], symmetries, objectives.Fixed(elements), tf.At(4))
        for m, optimizer in zip((model, there), optimizers, strict=True):
            run(m, optimizer, 10)
        pairs = zip(model.parameters(), there.parameters(), strict=True)
        gap = max(float((a - b).detach().abs().max()) for a, b in pairs)
        assert (gap < 1e-12) == same, f"{group}: {gap}"


def moved_state(policy: str, base: str = "adam") -> tuple[tf.Joint, Tensor, dict[str, Any], dict[str, Any]]:
    """The joint, the dense element that moved it, and the state of every parameter before and after the move."""
    model, symmetries = linear_chain(GeneralLinear(4))
    elements = symmetries.random(0.4)
    optimizer = BASES[base](model.parameters())
    teleporter = tf.attach(optimizer, symmetries, objectives.Fixed(elements), tf.At(3), second_moments=policy)
    states: list[dict[str, Any]] = []

    def look(_: object) -> None:
        states.append({n: copy.deepcopy(optimizer.state.get(p, {})) for n, p in model.named_parameters()})

    teleporter.before_move.append(look)
    teleporter.after_move.append(look)
    run(model, optimizer, 5)
    return symmetries["joint"], elements["joint"][0], states[0], states[1]


def test_keep_leaves_second_moments_alone_under_a_dense_element() -> None:
    _, g, before, after = moved_state("keep")
    for name in before:
        assert torch.equal(after[name]["exp_avg_sq"], before[name]["exp_avg_sq"])
    torch.testing.assert_close(after["0.weight"]["exp_avg"], g.inverse().mT @ before["0.weight"]["exp_avg"])
    torch.testing.assert_close(after["1.weight"]["exp_avg"], before["1.weight"]["exp_avg"] @ g.mT)


def test_project_mixes_second_moments_by_the_squares_of_the_gradients_factors() -> None:
    """Exact for gradients whose entries are uncorrelated: v₊ → (g⁻ᵀ∘g⁻ᵀ) v₊, v₋ → (g∘g) v₋."""
    _, g, before, after = moved_state("project")
    inverse = g.inverse().mT.square()
    torch.testing.assert_close(after["0.weight"]["exp_avg_sq"], inverse @ before["0.weight"]["exp_avg_sq"])
    torch.testing.assert_close(after["0.bias"]["exp_avg_sq"], inverse @ before["0.bias"]["exp_avg_sq"])
    torch.testing.assert_close(after["1.weight"]["exp_avg_sq"], before["1.weight"]["exp_avg_sq"] @ g.square().mT)
    torch.testing.assert_close(after["0.weight"]["exp_avg"], g.inverse().mT @ before["0.weight"]["exp_avg"])
    assert torch.equal(after["2.weight"]["exp_avg_sq"], before["2.weight"]["exp_avg_sq"])


@bases
def test_reset_starts_the_moved_parameters_anew_and_leaves_the_others(base: str) -> None:
    joint, _, before, after = moved_state("reset", base)
    for name in before:
        if name not in joint.parameters():
            for key, value in before[name].items():
                assert value is after[name][key] is None or torch.equal(torch.as_tensor(value), after[name][key])
        elif base == "adagrad":
            assert float(after[name]["step"]) == float(after[name]["sum"].abs().sum()) == 0
            assert float(before[name]["sum"].sum()) > 0
        else:
            assert not after[name]
            assert before[name]


def test_forgetting_gives_adagrad_its_initial_accumulator_back() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adagrad([parameter], initial_accumulator_value=0.5)
    parameter.grad = torch.ones(3)
    optimizer.step()
    forget_(optimizer, [parameter])
    assert torch.equal(optimizer.state[parameter]["sum"], torch.full((3,), 0.5))
    optimizer.step()
    assert torch.equal(optimizer.state[parameter]["sum"], torch.full((3,), 1.5))


class Shadowed(torch.optim.SGD):
    """SGD whose state holds a list of tensors, as Shampoo-like optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["factors"] = [torch.eye(4, dtype=torch.float64)]


UNKNOWN: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "adadelta": (lambda p: torch.optim.Adadelta(p, lr=0.0), "acc_delta"),
    "adamax": (lambda p: torch.optim.Adamax(p, lr=0.0), "exp_inf"),
    "rprop": (lambda p: torch.optim.Rprop(p, lr=0.0), "prev"),
    "factors": (lambda p: Shadowed(p, lr=0.0), "factors"),
}


@pytest.mark.parametrize(("make", "key"), UNKNOWN.values(), ids=UNKNOWN.keys())
@pytest.mark.parametrize("frame", ["stay", "return"])
def test_unknown_state_is_refused_before_anything_moves(
    make: Callable[[Any], Optimizer], key: str, frame: str
) -> None:
    model, symmetries = linear_chain(GeneralLinear(4))
    optimizer = make(model.parameters())
    tf.attach(optimizer, symmetries, objectives.Fixed(symmetries.random(0.4)), tf.At(1), frame=frame)
    run(model, optimizer, 1)
    backward(model, 1)
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
    with pytest.raises(ValueError, match=f"optimizer state '{key}' of '0.weight'.*has no known transformation"):
        optimizer.step()
    for (weight, gradient), parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(parameter, weight)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_counters_and_empty_state_do_not_move() -> None:
    model, _ = linear_chain(GeneralLinear(4))
    optimizer = torch.optim.Adam(model.parameters())
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    assert state_sources(optimizer, parameters) == []
    backward(model, 0)
    optimizer.step()
    kinds = sorted(kind for kind, _ in state_sources(optimizer, parameters))
    assert kinds == ["covector", "square"]


@pytest.mark.parametrize("held", [{"steps": {"done": torch.tensor(3.0)}}, [torch.tensor(3.0), torch.zeros(1)], {}, "warm"], ids=repr)
def test_counters_in_a_table_or_a_list_do_not_move_and_a_vector_among_them_is_refused(held: Any) -> None:
    model, _ = linear_chain(GeneralLinear(4))
    optimizer, parameters = torch.optim.Adam(model.parameters()), dict(model.named_parameters())
    optimizer.state[parameters["0.weight"]]["held"] = held
    assert state_sources(optimizer, parameters) == []
    optimizer.state[parameters["0.weight"]]["held"] = {"first": held, "then": [torch.zeros(2)]}
    with pytest.raises(ValueError, match=r"optimizer state 'held' of '0.weight', shape \(2,\), has no known transformation"):
        state_sources(optimizer, parameters)
