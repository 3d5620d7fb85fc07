"""How layers store their weights, and how a newcomer registers a layout, a role and its candidates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from teleport_fast import find_symmetries
from teleport_fast.discovery import candidates, roles, slots
from teleport_fast.discovery.candidates import Candidate, Views, maker
from teleport_fast.discovery.gains import centres, gain_shift, is_norm
from teleport_fast.discovery.roles import Role, builder
from teleport_fast.discovery.slots import Layer, Slot, layer_of, layout, matrix
from teleport_fast.symmetry import GeneralLinear, Joint


class Conv1D(nn.Module):
    """As transformers has it: weight (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))


def test_a_layer_is_known_by_its_axes() -> None:
    plain, turned = nn.Linear(3, 5), Conv1D(5, 3)
    for module, axis in ((plain, 0), (turned, 1)):
        layer = layer_of(module)
        assert layer is not None
        assert [(id(t), a) for t, a in layer.rows] == [(id(module.weight), axis), (id(module.bias), 0)]
        assert [(id(t), a) for t, a in layer.columns] == [(id(module.weight), 1 - axis)]
        assert (layer.in_features, layer.out_features) == (3, 5)
    assert layer_of(nn.LayerNorm(3)) is None
    with pytest.raises(TypeError, match=r"no layout is registered for LayerNorm \(norm\)"):
        _ = Slot("norm", nn.LayerNorm(3), 0, 3).parts


class Product(nn.Module):
    """y = x A B with both factors as bare parameters: no builder knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b


@dataclass(frozen=True)
class Factors(Role):
    name: str
    first: Slot
    second: Slot

    def reads(self) -> list[Slot]:
        return [self.first]

    def writes(self) -> list[Slot]:
        return [self.second]


def test_a_registered_role_is_found_and_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "_BUILDERS", list(roles._BUILDERS))
    monkeypatch.setattr(candidates, "_MAKERS", dict(candidates._MAKERS))
    model = nn.Sequential(Product())
    assert [joint.kind for joint in find_symmetries(model, torch.randn(6, 4))] == ["up-down"]  # by the recorded call

    @builder
    def factors(name: str, module: nn.Module) -> Iterator[Factors]:
        if isinstance(module, Product):
            first = Slot(name, module, 0, 3, tensors=matrix(module.a, None, out_axis=1))
            yield Factors(name, first, Slot(name, module, 0, 5, tensors=matrix(module.b, None, out_axis=1)))

    @maker(Factors)
    def factors_candidates(role: Role, views: Views) -> Iterator[Candidate]:
        assert isinstance(role, Factors)
        plus, minus = views.rows(role.first, 1, 3), views.columns(role.second, 1, 3)
        joint = Joint(f"{role.name}.rank", "rank", GeneralLinear(3), 1, 3, plus, minus)
        yield Candidate(joint.name, "rank", (joint,), "never seen")

    (joint,) = find_symmetries(model, torch.randn(6, 4))
    assert (joint.name, str(joint.group)) == ("0.rank", "GL(3)")


def test_a_registered_layout_makes_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Transposed(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(inputs, outputs))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel

    monkeypatch.setattr(slots, "_LAYOUTS", list(slots._LAYOUTS))

    @layout
    def transposed(module: nn.Module) -> Layer | None:
        return matrix(module.kernel, None, out_axis=1) if isinstance(module, Transposed) else None

    found = find_symmetries(nn.Sequential(Transposed(4, 6), nn.ReLU(), Transposed(6, 3)), torch.randn(5, 4))
    assert [str(joint.group) for joint in found] == ["positive diagonal(6)", "permutation(6)"]


class OneMore(nn.Module):
    """Gemma's norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class OneMoreNorm(OneMore):
    pass


def test_a_gains_shift_and_a_norms_mean_are_read_off_its_output() -> None:
    assert (gain_shift(OneMoreNorm(4)), centres(OneMoreNorm(4))) == (1.0, False)
    assert (gain_shift(nn.RMSNorm(4)), centres(nn.RMSNorm(4))) == (0.0, False)
    assert (gain_shift(nn.LayerNorm(4)), centres(nn.LayerNorm(4))) == (0.0, True)
    assert is_norm(OneMoreNorm(4))
    assert not is_norm(OneMore(4))
    with torch.device("meta"):
        assert gain_shift(OneMoreNorm(4)) == 1.0
