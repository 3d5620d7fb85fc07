"""Plain MLPs, under names that nobody knows: the activation decides what scales, every pointwise one lets units swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_fast import Symmetries, find_symmetries

Check = Callable[..., Symmetries]
Table = Callable[[Symmetries], dict[str, str]]


class Odd(nn.Module):
    """Two layers under names of their own, and any function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], inside: nn.Module | None = None) -> None:
        super().__init__()
        self.alpha, self.omega, self.inside = nn.Linear(4, 6), nn.Linear(6, 3), inside
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.alpha(x)
        return self.omega(self.between(y) if self.inside is None else self.inside(y))


POSITIVE, ANY, DENSE, NEURONS = "up-down, positive diagonal(6), 1", "up-down, diagonal(6), 1", "up-down, GL(6), 1", True
BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], str | None, bool]] = {
    "relu": (F.relu, POSITIVE, True),
    "relu in place": (lambda y: F.relu_(y), POSITIVE, True),
    "clamp": (lambda y: y.clamp(min=0), POSITIVE, True),
    "leaky relu": (lambda y: F.leaky_relu(y, 0.3), POSITIVE, True),
    "absolute value": (torch.abs, POSITIVE, True),
    "relu squared": (lambda y: F.relu(y).square(), "up-down-squared, positive diagonal(6), 1", True),
    "cubed": (lambda y: y**3, "up-down-squared, positive diagonal(6), 1", True),
    "times itself": (lambda y: y * y, "up-down-squared, positive diagonal(6), 1", True),
    "tanh": (torch.tanh, None, True),
    "gelu": (F.gelu, None, True),
    "softmax": (lambda y: y.softmax(-1), None, True),
    "shifted relu": (lambda y: F.relu(y + 1), None, True),
    "relu6": (F.relu6, None, True),
    "nothing": (lambda y: y, DENSE, False),
    "halved": (lambda y: y / 2, DENSE, False),
    "a constant per unit": (lambda y: y * torch.linspace(0.5, 2, 6, dtype=y.dtype), ANY, False),
    "a constant per unit, relu": (lambda y: (y * torch.linspace(0.5, 2, 6, dtype=y.dtype)).relu(), POSITIVE, False),
    "reversed": (lambda y: y.flip(-1), None, False),
    "sorted": (lambda y: y.sort(-1).values, None, False),
    "fourier": (lambda y: torch.fft.fft(y).real, None, False),
}


@pytest.mark.parametrize(("between", "scale", "neurons"), BETWEEN.values(), ids=BETWEEN.keys())
def test_what_stands_between_two_layers_decides(
    between: Callable[[Tensor], Tensor], scale: str | None, neurons: bool, found_exactly: Check, table: Table
) -> None:
    model, x = Odd(between), torch.randn(5, 4, dtype=torch.float64)
    if scale is None and not neurons:
        found = find_symmetries(model, x)
        assert len(found) == 0
        assert all(finding.reason for finding in found.findings)
        return
    found = table(found_exactly(model, (x,), (torch.randn(7, 4, dtype=torch.float64),)))
    assert found.pop("omega.up-down", None) == scale
    assert found == ({"omega.neurons": "neurons, permutation(6), 1"} if neurons else {})


@pytest.mark.parametrize("inside", [nn.PReLU(), nn.PReLU(6)], ids=["one slope", "a slope per unit"])
def test_slopes_move_with_their_units(inside: nn.PReLU, found_exactly: Check, table: Table) -> None:
    found = found_exactly(Odd(F.relu, inside), (torch.randn(5, 4, dtype=torch.float64),))
    assert table(found) == {"omega.up-down": POSITIVE, "omega.neurons": "neurons, permutation(6), 1"}
    assert ("inside.weight" in found["omega.neurons"].parameters()) == (inside.num_parameters > 1)


def test_a_norm_between_two_layers_parts_their_scales(found_exactly: Check, table: Table) -> None:
    found = found_exactly(Odd(F.relu, nn.LayerNorm(6)), (torch.randn(5, 4, dtype=torch.float64),))
    assert table(found)["inside.readers"] == "norm-readers, diagonal(6), 1"
    assert [str(joint.group) for joint in found] == ["diagonal(6)", "permutation(6)"]
    groups = found_exactly(Odd(F.relu, nn.GroupNorm(2, 6)), (torch.randn(5, 4, dtype=torch.float64),))
    assert table(groups)["omega.neurons"] == "neurons, permutation(3), 2"


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.first(x)) * self.second(x))


@pytest.mark.parametrize("gate", [F.silu, torch.sigmoid, F.relu], ids=["silu", "sigmoid", "relu"])
def test_a_gate_passes_the_scale_of_the_other_side(
    gate: Callable[[Tensor], Tensor], found_exactly: Check, table: Table
) -> None:
    found = found_exactly(Gated(gate), (torch.randn(5, 4, dtype=torch.float64),))
    assert table(found) == {
        "last.up-down": "up-down, diagonal(6), 1",
        "last.neurons": "neurons, permutation(6), 1",
    }
    assert "first.weight" not in found["last.up-down"].parameters()


class Skip(nn.Module):
    """x + f(x) between an entry and an exit: the stream's units are written twice and read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        return self.out(y + self.b(F.relu(self.a(y))))


def test_a_skip_connection_ties_its_writers(found_exactly: Check, table: Table) -> None:
    found = found_exactly(Skip(), (torch.randn(5, 4, dtype=torch.float64),))
    assert table(found) == {
        "residual": "residual, O(6), 1",
        "a.up-down": "up-down, GL(6), 1",
        "b.up-down": "up-down, positive diagonal(5), 1",
        "b.neurons": "neurons, permutation(5), 1",
    }
    stream = found["a.up-down"]
    assert {v.parameter for v in stream.plus} == {"into.weight", "into.bias", "b.weight", "b.bias"}
    assert {v.parameter for v in stream.minus} == {"a.weight", "out.weight"}


class Twice(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def test_a_tied_weight_keeps_the_joints_that_would_move_it_in_two_ways_from_moving(found_exactly: Check) -> None:
    x = (torch.randn(5, 4, dtype=torch.float64),)
    assert len(found_exactly(Twice(tied=False), x)) == 4
    assert len(find_symmetries(Twice(tied=True), x)) == 0


class Recurrent(nn.Module):
    """One hidden state, read and written by the same square matrix at every step."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.again, self.out, self.act = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3), act

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.into(x[:, 0]))
        for t in range(1, x.shape[1]):
            h = self.act(self.into(x[:, t]) + self.again(h))
        return self.out(h)


def test_a_recurrent_state_moves_by_conjugation(found_exactly: Check, table: Table) -> None:
    x = (torch.randn(5, 3, 4, dtype=torch.float64),)
    found = found_exactly(Recurrent(F.relu), x)
    assert sorted(table(found).values()) == ["neurons, permutation(6), 1", "up-down, positive diagonal(6), 1"]
    assert {joint.group.form for joint in found_exactly(Recurrent(torch.tanh), x)} == {"permutation"}


class Sequence(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cells, self.head = kind(4, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_the_states_of_torchs_recurrent_layers_can_be_reordered(kind: Any, found_exactly: Check) -> None:
    found = found_exactly(Sequence(kind), (torch.randn(2, 3, 4, dtype=torch.float64),))
    assert [str(joint.group) for joint in found] == ["permutation(6)", "permutation(6)"]
    assert {name for joint in found for name in joint.parameters()} >= {"cells.weight_hh_l0", "cells.weight_hh_l1"}


def test_a_lone_unit_scales() -> None:
    found = find_symmetries(nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2)), torch.randn(5, 3))
    assert [str(joint.group) for joint in found] == ["positive diagonal(1)"]


def test_structure_without_numbers_is_what_the_proof_finds(table: Table) -> None:
    model, x = Skip(), torch.randn(5, 4)
    training = {name: module.training for name, module in model.named_modules()}
    proven = table(find_symmetries(model, x))
    assert proven.pop("residual")  # a stream is known only by proof
    assert table(find_symmetries(model, x, verify=False)) == proven
    assert {name: module.training for name, module in model.named_modules()} == training


class Fussy(nn.Module):
    """Its hidden units are told apart in a way that no operator shows: a table of numbers, by Python."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.omega = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.alpha(x)
        return self.omega(torch.stack([y[:, i] * (i + 1) if i % 2 else y[:, i].tanh() for i in range(6)], -1))


def test_the_probe_refutes_a_wrong_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    from teleport_fast.discovery.trace import rules

    model, x = Odd(torch.tanh), torch.randn(5, 4, dtype=torch.float64)
    assert "omega.up-down" not in {joint.name for joint in find_symmetries(model, x)}
    monkeypatch.setitem(rules.RULES, "tanh", rules.homogeneous)  # a rule that lies
    found = find_symmetries(model, x)
    assert {joint.name for joint in found} == {"omega.neurons"}
    (finding,) = [f for f in found.findings if f.name == "omega.up-down"]
    assert finding.status == "rejected"
    assert finding.deviation is not None and finding.deviation > 1e-3


def test_units_that_are_treated_one_by_one_keep_what_is_theirs() -> None:
    found = find_symmetries(Fussy(), torch.randn(5, 4, dtype=torch.float64))
    assert not [joint for joint in found if joint.group.form == "permutation" and joint.width == 6]
    assert found.verify(Fussy(), torch.randn(9, 4, dtype=torch.float64)).ok


def test_a_module_with_an_unknown_operator_is_named_with_it() -> None:
    found = find_symmetries(Odd(lambda y: y.sort(-1).values), torch.randn(5, 4))
    reasons: dict[str, Any] = {f.name: f.reason for f in found.findings}
    assert "operator sort has no rule" in reasons["alpha"]
