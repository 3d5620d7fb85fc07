"""What must not move is said, tensor by tensor: frozen, tied, computed, quantized, on meta, on several devices."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from teleport_fast import Symmetries, find_symmetries
from teleport_fast.discovery.guards import shared_memory, stuck
from teleport_fast.objectives import make_objective
from teleport_fast.plan import Plan
from teleport_fast.symmetry import Joint, PositiveDiagonal, View


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


X = torch.linspace(-2, 2, 20).reshape(5, 4).sin()


def said(found: Symmetries, name: str) -> str:
    """What explain() says about one name, all its lines in one."""
    lines = [line.split() for line in found.explain().splitlines()]
    return " | ".join(" ".join(line[1:]) for line in lines if line and line[0] == name)


class Twins(nn.Module):
    """Three layers; `twin` puts the second one's weight into the memory of the first one's, as a Parameter of its own."""

    def __init__(self, twin: Callable[[Tensor], Tensor], device: str = "cpu") -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, n, device=device) for n in (4, 4, 3))
        self.b.weight = nn.Parameter(twin(self.a.weight.data))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))  # type: ignore[no-any-return]


def test_parameters_in_one_memory_do_not_move_though_a_copy_would_hold_them_apart() -> None:
    assert len(find_symmetries(Twins(torch.clone), X)) == 4
    for twin in (lambda w: w, lambda w: w.T, lambda w: w.flatten()[:16].view(4, 4)):
        model = Twins(twin)
        before, found = model(X), find_symmetries(model, X)
        assert len(found) == 0
        assert "'a.weight' shares its memory with 'b.weight', which would move with it" in said(found, "b.up-down")
        apart = find_symmetries(Twins(torch.clone), X)  # what a copy proves: applied here, it changes the outputs
        apart.apply_(model, {"b.up-down": apart.random()["b.up-down"]})
        assert (model(X) - before).norm() > 1e-3 * before.norm()


def test_neighbours_in_one_buffer_move_on_their_own() -> None:
    model = Twins(torch.clone)
    flat = torch.randn(32)
    model.a.weight, model.b.weight = (nn.Parameter(part.view(4, 4)) for part in flat.split(16))
    found = find_symmetries(model, X)
    assert len(found) == 4
    before = model(X)
    found.apply_(model, found.random())
    assert (model(X) - before).norm() < 1e-5 * before.norm()


def test_a_parameter_that_holds_two_which_do_not_meet_shares_its_memory_with_both() -> None:
    flat = torch.randn(32)
    tensors = {"whole": flat, "first": flat[:4], "second": flat[8:12]}
    assert shared_memory(tensors) == {"whole": "first", "first": "whole", "second": "whole"}
    assert shared_memory({"first": flat[:4], "second": flat[8:12]}) == {}


def test_parameters_in_one_memory_are_seen_on_meta_too() -> None:
    found = find_symmetries(Twins(lambda w: w, "meta"), X, verify=False)
    assert len(found) == 0
    assert "'a.weight': it shares its memory with another parameter" in found.explain()
    assert len(find_symmetries(Twins(torch.clone, "meta"), X, verify=False)) == 4


def test_weight_norm_moves_by_its_gain_alone_and_only_where_that_is_exact() -> None:
    model = chain()
    parametrizations.weight_norm(model[2])
    found = find_symmetries(model, X)
    assert {joint.name for joint in found} == {"4.up-down"}
    assert set(found["4.up-down"].parameters()) == {
        "2.parametrizations.weight.original0", "2.bias", "4.weight",
    }  # fmt: skip
    assert "computed by WeightNorm from parameters of its own" in said(found, "2.weight")
    assert "it meets a weight that is computed" in said(found, "0")
    assert found.verify(model, 2 * X).ok


@pytest.mark.parametrize("norm", ["spectral_norm", "orthogonal"])
def test_other_parametrizations_stay(norm: str) -> None:
    model = chain()
    getattr(parametrizations, norm)(model[2])
    found = find_symmetries(model, X)
    assert len(found) == 0
    assert "parameters of its own" in said(found, "2.weight")
    assert "no rule" in said(found, "2.parametrizations.weight")


def test_a_weight_that_a_hook_computes_is_refused_with_the_remedy() -> None:
    model = chain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[2])
    with pytest.raises(ValueError, match=r"cannot be copied for the proof .* torch.nn.utils.parametrizations instead"):
        find_symmetries(model, X)


def quantized(*names: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(chain(), set(names), dtype=torch.qint8)


def test_a_dynamically_quantized_layer_keeps_its_joints_from_moving() -> None:
    found = find_symmetries(quantized("4"), X)
    assert {joint.name for joint in found} == {"2.up-down", "2.neurons"}
    assert "'4.weight' is quantized, a move would round it" in said(found, "4.up-down")
    assert "its weight is quantized" in said(found, "4")


def test_a_quantized_layer_within_another_module_is_made_plain_for_the_proof() -> None:
    found = find_symmetries(nn.Sequential(quantized("4")), X)
    assert {joint.name for joint in found} == {"0.2.up-down", "0.2.neurons"}


class Int8(nn.Module):
    """A linear layer stored in 8 bits with a scale per row."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs)
        self.scale = nn.Parameter(weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_integers_are_named_and_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Int8(6, 5), nn.ReLU(), nn.Linear(5, 3))
    found = find_symmetries(model, X)
    assert not [joint for joint in found if "2." in " ".join(joint.parameters())]
    assert "it holds int8 numbers (quantized)" in said(found, "2.weight")


def test_parameters_on_meta_are_proven_on_a_stand_in_or_taken_as_structure() -> None:
    with torch.device("meta"):
        model = chain()

    def table(found: Symmetries) -> set[tuple[str, str]]:
        return {(joint.name, str(joint.group)) for joint in found}

    found, real = find_symmetries(model, X), find_symmetries(chain(), X)
    assert table(found) == table(real)
    assert "what is proven is proven on a stand-in" in said(found, "model")
    structure = find_symmetries(model, X, verify=False)
    assert sorted(group for _, group in table(structure)) == sorted(group for _, group in table(real))
    assert "unproven" in structure.explain()
    assert model[0].weight.is_meta


def test_parameters_in_half_precision_are_proven_in_float64() -> None:
    model = chain().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    found = find_symmetries(model, X)
    assert len(found) == 4
    assert all(finding.deviation < 1e-10 for finding in found.findings if finding.status == "found")
    assert "proven on a float64 copy; a move of bfloat16 parameters rounds to bfloat16" in said(found, "model")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found.apply_(model, found.random())
    assert model[0].weight.dtype == torch.bfloat16


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(F.relu(self.up(self.table(ids)))))


def test_tied_and_shared_tensors_are_named() -> None:
    found = find_symmetries(Tied(), torch.randint(7, (2, 4)))
    assert "also 'head.weight': it moves once" in said(found, "table.weight")
    assert "down.up-down" in " ".join(joint.name for joint in found) or "up-down" in {j.name for j in found}
    layer = nn.Linear(4, 4)
    shared = find_symmetries(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2)), X)
    assert "also '2': it moves once" in said(shared, "0")
    assert not [joint for joint in shared if "0.weight" in joint.parameters()]


def test_a_frozen_layer_is_named() -> None:
    model = chain()
    model[2].weight.requires_grad_(False)
    found = find_symmetries(model, X)
    assert len(found) == 0
    assert "'2.weight' is frozen (requires_grad=False)" in said(found, "2.up-down")


def joint(first: str, second: str) -> Joint:
    plus, minus = (View(first, 0, 1, 3),), (View(second, 1, 1, 3),)
    return Joint(f"{first}-{second}", "up-down", PositiveDiagonal(3), 1, 3, plus, minus)


def test_a_joint_across_devices_does_not_move_and_devices_have_buckets_of_their_own() -> None:
    def parameter(device: str) -> nn.Parameter:
        return nn.Parameter(torch.empty(3, 3, device=device))

    tensors: dict[str, Any] = {name: parameter(d) for name, d in (("a", "cpu"), ("b", "cpu"), ("c", "meta"), ("d", "meta"))}
    why = stuck(joint("a", "c"), tensors)
    assert why is not None and why.startswith("its tensors are on several devices (cpu, meta)")
    assert stuck(joint("a", "b"), tensors) is None
    optimizer = torch.optim.SGD(list(tensors.items()), lr=0.1)
    joints = Symmetries((joint("a", "b"), joint("c", "d")))
    plan = Plan(joints, optimizer, make_objective("grad_norm"))
    assert [bucket.parameters() for bucket in plan.buckets] == [["a", "b"], ["c", "d"]]
